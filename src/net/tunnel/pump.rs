//! Bytes between a TCP connection and a QUIC stream.
//!
//! No buffer belongs to a stream: what is read from TCP goes into a buffer of the thread once there
//! is something to read, and from there into QUIC's send queue; what QUIC received goes to TCP as it
//! is. So thousands of idle streams cost their states and nothing else.
//!
//! The ends of both directions are passed on one by one, so that half-closed connections work.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::io::{self, IoSlice};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use quinn::{RecvStream, SendStream};
use tokio::io::AsyncWriteExt;
use tokio::net::tcp::{ReadHalf, WriteHalf};

use super::StreamError;

/// Size of a thread's buffer (bytes): as much as one read of a busy connection may bring. A UDP
/// datagram fits too.
const BUFFER_BYTES: usize = 64 * 1024;
/// With less space than this left (bytes), a new buffer is taken.
const READ_MIN: usize = 16 * 1024;
/// Reads up to this size (bytes) are copied: they would hold the whole buffer until they are
/// acknowledged.
const COPIED_MAX: usize = 8 * 1024;
/// Chunks that are written to TCP with one call; a chunk is what one packet brought.
const CHUNKS: usize = 16;
/// A connection that takes nothing for this long is stalled. Nobody is hurt by that unless there are
/// many of them; but when they fill the tunnel's window, all its streams wait for this long.
const STALLED_AFTER: Duration = Duration::from_secs(5);
/// How often a stalled one looks whether it has to go.
const STALLED_POLL: Duration = Duration::from_secs(1);
/// Stalled streams that a tunnel bears: each holds up to a stream's window, and together three
/// quarters of the tunnel's. Beyond, the longest stalled is reset.
const STALLED_MAX: usize = 24;

thread_local! {
    static BUFFER: RefCell<BytesMut> = RefCell::new(BytesMut::new());
}

/// Puts `head` and what `read` brings into one piece. `read` gets space for [`READ_MIN`] bytes and
/// more, for [`BUFFER_BYTES`] when `whole` is set.
pub(super) fn read_with(
    head: &[u8],
    whole: bool,
    read: impl FnOnce(&mut BytesMut) -> io::Result<usize>,
) -> io::Result<Bytes> {
    BUFFER.with_borrow_mut(|buffer| {
        let wanted = if whole { head.len() + BUFFER_BYTES } else { READ_MIN };
        if buffer.capacity() < wanted {
            buffer.reserve(head.len() + BUFFER_BYTES);
        }
        buffer.extend_from_slice(head);
        if let Err(error) = read(buffer) {
            buffer.clear();
            return Err(error);
        }
        if buffer.len() > COPIED_MAX {
            return Ok(buffer.split().freeze());
        }
        let piece = Bytes::copy_from_slice(buffer);
        buffer.clear();
        Ok(piece)
    })
}

/// Sends what the connection brings until its end, and then ends the stream.
///
/// # Errors
/// [`StreamError::Broken`].
pub(super) async fn from_tcp(
    tcp: &ReadHalf<'_>,
    send: &mut SendStream,
    count: &AtomicU64,
) -> Result<(), StreamError> {
    loop {
        tcp.readable().await.map_err(|_| StreamError::Broken)?;
        match read_with(&[], false, |buffer| tcp.try_read_buf(buffer)) {
            Ok(piece) if piece.is_empty() => {
                let _ = send.finish();
                return Ok(());
            }
            Ok(piece) => {
                let bytes = piece.len() as u64;
                send.write_chunk(piece).await.map_err(|_| StreamError::Broken)?;
                count.fetch_add(bytes, Ordering::Relaxed);
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(_) => return Err(StreamError::Broken),
        }
    }
}

/// Writes what the stream brings until its end, and then ends the connection.
///
/// # Errors
/// [`StreamError::Broken`], [`StreamError::Stalled`].
pub(super) async fn to_tcp(
    recv: &mut RecvStream,
    tcp: &mut WriteHalf<'_>,
    count: &AtomicU64,
    stalls: &Stalls,
) -> Result<(), StreamError> {
    let mut chunks: [Bytes; CHUNKS] = std::array::from_fn(|_| Bytes::new());
    while let Some(filled) = recv.read_chunks(&mut chunks).await.map_err(|_| StreamError::Broken)? {
        let mut rest = &mut chunks[..filled];
        while !rest.is_empty() {
            writable(tcp, stalls).await?;
            let mut slices = [IoSlice::new(&[]); CHUNKS];
            for (slice, chunk) in slices.iter_mut().zip(rest.iter()) {
                *slice = IoSlice::new(chunk);
            }
            let written = match tcp.try_write_vectored(&slices[..rest.len()]) {
                Ok(0) => return Err(StreamError::Broken),
                Ok(written) => written,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
                Err(_) => return Err(StreamError::Broken),
            };
            count.fetch_add(written as u64, Ordering::Relaxed);
            rest = advance(rest, written);
        }
    }
    tcp.shutdown().await.map_err(|_| StreamError::Broken)
}

/// Lets go of what was written, and returns the rest.
fn advance(chunks: &mut [Bytes], mut written: usize) -> &mut [Bytes] {
    let mut done = 0;
    for chunk in chunks.iter_mut() {
        if written < chunk.len() {
            chunk.advance(written);
            break;
        }
        written -= chunk.len();
        *chunk = Bytes::new();
        done += 1;
    }
    &mut chunks[done..]
}

async fn writable(tcp: &WriteHalf<'_>, stalls: &Stalls) -> Result<(), StreamError> {
    if let Ok(ready) = tokio::time::timeout(STALLED_AFTER, tcp.writable()).await {
        return ready.map_err(|_| StreamError::Broken);
    }
    let stalled = stalls.enter();
    loop {
        if stalled.must_go() {
            return Err(StreamError::Stalled);
        }
        if let Ok(ready) = tokio::time::timeout(STALLED_POLL, tcp.writable()).await {
            return ready.map_err(|_| StreamError::Broken);
        }
    }
}

/// The stalled streams of one QUIC connection. A far end that does not read fills its stream's
/// window and stops there; many of them would fill the connection's window, and everybody waits.
#[derive(Default)]
pub(super) struct Stalls {
    next: AtomicU64,
    stalled: Mutex<BTreeSet<u64>>,
}

/// One of them, until it is dropped.
pub(super) struct Stalled<'a> {
    stalls: &'a Stalls,
    number: u64,
}

impl Stalls {
    fn enter(&self) -> Stalled<'_> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        self.lock().insert(number);
        Stalled { stalls: self, number }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeSet<u64>> {
        self.stalled.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Stalled<'_> {
    /// Whether there are too many, and this one has been stalled for longest.
    fn must_go(&self) -> bool {
        let stalled = self.stalls.lock();
        stalled.len() > STALLED_MAX && stalled.first() == Some(&self.number)
    }
}

impl Drop for Stalled<'_> {
    fn drop(&mut self) {
        self.stalls.lock().remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_stalled_makes_room_and_only_when_there_are_too_many() {
        let stalls = Stalls::default();
        let mut stalled: Vec<_> = (0..STALLED_MAX).map(|_| stalls.enter()).collect();
        assert!(stalled.iter().all(|one| !one.must_go()));
        stalled.push(stalls.enter());
        let must_go =
            |stalled: &[Stalled<'_>]| stalled.iter().map(Stalled::must_go).collect::<Vec<bool>>();
        let mut first_only = vec![false; STALLED_MAX + 1];
        first_only[0] = true;
        assert_eq!(must_go(&stalled), first_only);
        stalled.remove(0);
        assert!(stalled.iter().all(|one| !one.must_go()), "one gone is enough");
    }

    #[test]
    fn small_pieces_do_not_hold_the_buffer_and_an_error_leaves_nothing_in_it() {
        let fill = |bytes: usize| {
            move |buffer: &mut BytesMut| {
                buffer.extend_from_slice(&vec![7; bytes]);
                Ok(bytes)
            }
        };
        for (head, bytes) in [(&b"head"[..], 3), (b"", COPIED_MAX + 1), (b"x", 0), (b"", 1)] {
            let piece = read_with(head, true, fill(bytes)).unwrap();
            assert_eq!(piece[..head.len()], *head);
            assert_eq!(piece[head.len()..], vec![7; bytes]);
        }
        let failing = |_: &mut BytesMut| Err(io::ErrorKind::WouldBlock.into());
        assert!(read_with(b"head", false, failing).is_err());
        assert_eq!(read_with(b"", false, fill(1)).unwrap(), [7][..]);
    }

    #[test]
    fn what_was_written_is_let_go() {
        let three = || [b"ab", b"cd", b"ef"].map(|text| Bytes::from_static(text));
        for (written, left) in
            [(0, &b"abcdef"[..]), (1, b"bcdef"), (2, b"cdef"), (5, b"f"), (6, b"")]
        {
            let mut chunks = three();
            let rest = advance(&mut chunks, written).concat();
            assert_eq!(rest, left);
            let held: usize = chunks.iter().map(Bytes::len).sum();
            assert_eq!(held, left.len());
        }
    }
}
