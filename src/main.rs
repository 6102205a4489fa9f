//! The `meshwise` program: see `meshwise --help`.

use std::process::ExitCode;

fn main() -> ExitCode {
    meshwise::cli::run()
}
