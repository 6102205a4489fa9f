//! The client side of the control API, for the command line.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::Duration;

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;

use super::types::ErrorBody;

/// Longest answer that is read (bytes).
const ANSWER_BYTES_MAX: usize = 64 * 1024 * 1024;
/// Longest wait for an answer: longer than the node itself waits for the DHT.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(45);

/// Why a command did not reach the node, or what the node answered.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens on the socket.
    #[error("no node runs on {data_dir}; start one with 'meshwise node --data-dir {data_dir}'")]
    NoNode {
        /// Where it was looked for.
        data_dir: String,
    },
    /// The socket is there and cannot be used.
    #[error("cannot talk to the node on {data_dir}: {error}; is it yours?")]
    Socket {
        /// Where it was looked for.
        data_dir: String,
        /// What the system said.
        error: std::io::Error,
    },
    /// The node refused; its own words.
    #[error("{message}")]
    Refused {
        /// One line.
        message: String,
        /// HTTP status.
        status: StatusCode,
    },
    /// The connection broke, or what came back is not what this program expects.
    #[error("the node's answer makes no sense ({0}); are its version and this program's the same?")]
    Protocol(String),
}

impl ClientError {
    /// Whether the node found no sense in what it was asked.
    pub fn is_wrong_usage(&self) -> bool {
        matches!(self, Self::Refused { status: StatusCode::BAD_REQUEST, .. })
    }
}

/// Talks to the node of one data directory.
#[derive(Clone, Debug)]
pub struct Client {
    data_dir: PathBuf,
}

impl Client {
    /// A client for the node of this data directory.
    pub fn new(data_dir: &Path) -> Self {
        Self { data_dir: data_dir.to_owned() }
    }

    /// `GET`.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        self.call(Method::GET, path, None::<&()>).await
    }

    /// `DELETE`.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn delete<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        self.call(Method::DELETE, path, None::<&()>).await
    }

    /// `POST` with a JSON body.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn post<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
    ) -> Result<T, ClientError> {
        self.call(Method::POST, path, Some(body)).await
    }

    async fn call<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<&impl Serialize>,
    ) -> Result<T, ClientError> {
        let socket = self.data_dir.join(super::SOCKET);
        let stream = UnixStream::connect(&socket).await.map_err(|error| {
            let data_dir = self.data_dir.display().to_string();
            match error.kind() {
                ErrorKind::NotFound | ErrorKind::ConnectionRefused => {
                    ClientError::NoNode { data_dir }
                }
                _ => ClientError::Socket { data_dir, error },
            }
        })?;
        let calling = async {
            let io = TokioIo::new(stream);
            let (mut sender, connection) =
                hyper::client::conn::http1::handshake(io).await.map_err(protocol)?;
            let connection = tokio::spawn(connection);
            let bytes = match body {
                Some(body) => serde_json::to_vec(body).map_err(protocol)?,
                None => Vec::new(),
            };
            let request = Request::builder()
                .method(method)
                .uri(path)
                .header("host", "meshwise")
                .header("content-type", "application/json")
                .body(Full::new(Bytes::from(bytes)))
                .map_err(protocol)?;
            let response = sender.send_request(request).await.map_err(protocol)?;
            let status = response.status();
            let body = Limited::new(response.into_body(), ANSWER_BYTES_MAX);
            let bytes = body.collect().await.map_err(protocol)?.to_bytes();
            connection.abort();
            Ok((status, bytes))
        };
        let called = tokio::time::timeout(ANSWER_TIMEOUT, calling).await;
        let (status, bytes) = called.map_err(|_| protocol("no answer in time"))??;
        if status.is_success() {
            return serde_json::from_slice(&bytes).map_err(protocol);
        }
        let message = match serde_json::from_slice::<ErrorBody>(&bytes) {
            Ok(body) => body.error,
            Err(_) => format!("{status}: {}", String::from_utf8_lossy(&bytes)),
        };
        Err(ClientError::Refused { message, status })
    }
}

fn protocol(error: impl std::fmt::Display) -> ClientError {
    ClientError::Protocol(error.to_string())
}
