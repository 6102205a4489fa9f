//! One stream through a tunnel, and why there is none.

use std::sync::Arc;
use std::time::Duration;

use quinn::{Connection, RecvStream, SendStream, VarInt};
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;

use super::local::OpenStream;
use super::pump::{self, Stalls};
use super::udp::Flows;

/// The answer to a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Status {
    Accepted = 0,
    UnknownService = 1,
    NotAllowed = 2,
    TargetUnreachable = 3,
    Busy = 4,
}

/// How long a provider may take to accept a stream: it connects to its target meanwhile.
const ACCEPT_TIMEOUT: Duration = Duration::from_secs(20);

/// Why a stream failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StreamError {
    /// The tunnel is not open.
    Closed,
    /// No route to the provider is alive.
    NoRoute,
    /// The provider does not answer.
    Unreachable,
    /// The connection to the provider was lost.
    Lost,
    /// The provider does not provide the service.
    UnknownService,
    /// This node may not use it.
    NotAllowed,
    /// Nothing answers at the service's target.
    TargetUnreachable,
    /// The provider carries as many flows as it bears.
    Busy,
    /// An answer that this version does not know.
    Refused,
    /// One of the two ends broke off.
    Broken,
    /// One of too many whose far end does not read.
    Stalled,
}

impl StreamError {
    /// A word for counters and the log.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Closed => "tunnel-closed",
            Self::NoRoute => "tunnel-no-route",
            Self::Unreachable => "tunnel-unreachable",
            Self::Lost => "tunnel-lost",
            Self::UnknownService => "stream-refused-unknown-service",
            Self::NotAllowed => "stream-refused-not-allowed",
            Self::TargetUnreachable => "stream-refused-target-unreachable",
            Self::Busy => "stream-refused-busy",
            Self::Refused => "stream-refused",
            Self::Broken => "stream-broken",
            Self::Stalled => "stream-stalled",
        }
    }

    pub(super) fn refused(byte: u8) -> Self {
        match byte {
            1 => Self::UnknownService,
            2 => Self::NotAllowed,
            3 => Self::TargetUnreachable,
            4 => Self::Busy,
            _ => Self::Refused,
        }
    }
}

/// A QUIC connection and what its streams share.
pub(super) struct Live {
    pub(super) connection: Connection,
    pub(super) stalls: Stalls,
    pub(super) flows: Flows,
}

impl Live {
    pub(super) fn new(connection: Connection) -> Arc<Self> {
        Arc::new(Self { connection, stalls: Stalls::default(), flows: Flows::default() })
    }

    pub(super) fn is_open(&self) -> bool {
        self.connection.close_reason().is_none()
    }

    /// Does the work until the connection is lost: one half of a stream may be over already and
    /// would not notice.
    pub(super) async fn while_open(
        &self,
        work: impl Future<Output = Result<(), StreamError>>,
    ) -> Result<(), StreamError> {
        tokio::select! {
            biased;
            result = work => result,
            _ = self.connection.closed() => Err(StreamError::Lost),
        }
    }
}

/// A stream to a provider, which has been told the service.
pub struct TunnelStream {
    pub(super) live: Arc<Live>,
    pub(super) send: SendStream,
    pub(super) recv: RecvStream,
    pub(super) accepted: bool,
    pub(super) open: OpenStream,
}

impl TunnelStream {
    /// Waits until the provider has accepted the stream.
    ///
    /// # Errors
    /// Its refusal, or [`StreamError::Lost`].
    pub async fn accepted(&mut self) -> Result<(), StreamError> {
        accepted(&mut self.recv, &mut self.accepted).await
    }

    /// Carries a TCP connection over the stream until both directions have ended.
    ///
    /// # Errors
    /// [`StreamError`]; both ends are told.
    pub async fn carry(mut self, tcp: TcpStream) -> Result<(), StreamError> {
        let mut tcp = Carried::new(tcp);
        let traffic = self.open.traffic();
        let (tcp_read, mut tcp_write) = tcp.tcp.split();
        let up = pump::from_tcp(&tcp_read, &mut self.send, &traffic.sent);
        let down = async {
            accepted(&mut self.recv, &mut self.accepted).await?;
            let stalls = &self.live.stalls;
            pump::to_tcp(&mut self.recv, &mut tcp_write, &traffic.received, stalls).await
        };
        let both = async { tokio::try_join!(up, down).map(|_| ()) };
        let result = self.live.while_open(both).await;
        tcp.ended = result.is_ok();
        if result.is_err() {
            self.abort();
        }
        result
    }

    pub(super) fn abort(&mut self) {
        let _ = self.send.reset(VarInt::from_u32(1));
        let _ = self.recv.stop(VarInt::from_u32(1));
    }
}

/// Whoever asked is gone, or another provider was quicker.
impl Drop for TunnelStream {
    fn drop(&mut self) {
        if !self.accepted {
            self.abort();
        }
    }
}

/// A TCP connection that is reset when it breaks in its middle: what came so far must not pass for
/// all.
pub(super) struct Carried {
    pub(super) tcp: TcpStream,
    /// Both directions have come to their ends.
    pub(super) ended: bool,
}

impl Carried {
    pub(super) fn new(tcp: TcpStream) -> Self {
        let _ = tcp.set_nodelay(true);
        Self { tcp, ended: false }
    }
}

impl Drop for Carried {
    fn drop(&mut self) {
        if !self.ended {
            let _ = self.tcp.set_zero_linger();
        }
    }
}

async fn accepted(recv: &mut RecvStream, accepted: &mut bool) -> Result<(), StreamError> {
    if *accepted {
        return Ok(());
    }
    let answer = tokio::time::timeout(ACCEPT_TIMEOUT, recv.read_u8()).await;
    let status = answer.map_err(|_| StreamError::Unreachable)?.map_err(|_| StreamError::Lost)?;
    if status != Status::Accepted as u8 {
        return Err(StreamError::refused(status));
    }
    *accepted = true;
    Ok(())
}
