//! TLS 1.3 between nodes that prove their identities, as libp2p's specification has it, for links and
//! for tunnels. It differs from the library's own configuration in two points:
//! - AES-GCM goes before ChaCha20 where the processor has instructions for it: a relay spends a third
//!   of its time on the cipher otherwise.
//! - What one turn of a link writes leaves together ([`Gathered`]): the multiplexer flushes after
//!   every frame of 16 KiB, and each flush is a system call and wakes the neighbour.

use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use futures::future::BoxFuture;
use futures::io::BufReader;
use futures::{AsyncRead, AsyncWrite};
use futures_rustls::rustls::client::danger::{
    HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier,
};
use futures_rustls::rustls::client::{ClientConfig, Resumption};
use futures_rustls::rustls::crypto::{CryptoProvider, aws_lc_rs};
use futures_rustls::rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use futures_rustls::rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use futures_rustls::rustls::server::{NoServerSessionStorage, ServerConfig};
use futures_rustls::rustls::sign::{CertifiedKey, SingleCertAndKey};
use futures_rustls::rustls::{
    self, CertificateError, DigitallySignedStruct, DistinguishedName, SignatureScheme,
};
use futures_rustls::{TlsAcceptor, TlsConnector, TlsStream};
use libp2p::PeerId;
use libp2p::core::UpgradeInfo;
use libp2p::core::upgrade::{InboundConnectionUpgrade, OutboundConnectionUpgrade};
use libp2p::identity::Keypair;
use libp2p_tls::certificate;

/// What is read from a connection at once (bytes); the TLS library by itself reads 4 KiB.
const READ_BYTES: usize = 64 * 1024;
/// What leaves a link at the latest (bytes): four records.
const GATHERED_BYTES: usize = 64 * 1024;
const PROTOCOL: &str = "/tls/1.0.0";
const ALPN: &[u8] = b"libp2p";
/// Without RSA, which no node of ours has.
const SCHEMES: [SignatureScheme; 3] = [
    SignatureScheme::ECDSA_NISTP256_SHA256,
    SignatureScheme::ECDSA_NISTP384_SHA384,
    SignatureScheme::ED25519,
];

/// Why a connection could not be secured.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// No certificate could be made of the identity.
    #[error("cannot make a certificate: {0}")]
    Generate(#[from] certificate::GenError),
    /// The other end's certificate does not prove an identity.
    #[error("the certificate of the other end is no identity: {0}")]
    Parse(#[from] certificate::ParseError),
    /// The other end has shown none, or several.
    #[error("the other end has not shown one certificate")]
    NoCertificate,
    /// TLS refused.
    #[error("TLS refused: {0}")]
    Tls(#[from] rustls::Error),
    /// The handshake failed.
    #[error("the handshake failed: {0}")]
    Io(#[from] io::Error),
}

/// The end of a tunnel that opens it, or of a link that was dialled; with `expected`, only that
/// node is accepted. The application protocol is for the caller to set.
///
/// # Errors
/// [`TlsError`].
pub fn client_config(
    identity: &Keypair,
    expected: Option<PeerId>,
) -> Result<ClientConfig, TlsError> {
    let provider = provider();
    let mut config = ClientConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(IdentityVerifier { expected }))
        .with_client_cert_resolver(Arc::new(certified(identity, &provider)?));
    // A resumed session would not show its certificate again.
    config.resumption = Resumption::disabled();
    Ok(config)
}

/// The other end. The application protocol is for the caller to set.
///
/// # Errors
/// [`TlsError`].
pub fn server_config(identity: &Keypair) -> Result<ServerConfig, TlsError> {
    let provider = provider();
    let mut config = ServerConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(Arc::new(IdentityVerifier { expected: None }))
        .with_cert_resolver(Arc::new(certified(identity, &provider)?));
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(config)
}

fn certified(identity: &Keypair, provider: &CryptoProvider) -> Result<SingleCertAndKey, TlsError> {
    let (certificate, key) = certificate::generate(identity)?;
    let key = provider.key_provider.load_private_key(key)?;
    Ok(CertifiedKey::new(vec![certificate], key).into())
}

/// The end that dials has the say about the cipher, so that a machine without instructions for AES
/// gets what is fast there.
fn provider() -> Arc<CryptoProvider> {
    use aws_lc_rs::cipher_suite::{
        TLS13_AES_128_GCM_SHA256, TLS13_AES_256_GCM_SHA384, TLS13_CHACHA20_POLY1305_SHA256,
    };
    let aes = [TLS13_AES_128_GCM_SHA256, TLS13_AES_256_GCM_SHA384];
    let mut suites = Vec::from(aes);
    suites.insert(if has_aes() { aes.len() } else { 0 }, TLS13_CHACHA20_POLY1305_SHA256);
    Arc::new(CryptoProvider { cipher_suites: suites, ..aws_lc_rs::default_provider() })
}

fn has_aes() -> bool {
    #[cfg(target_arch = "x86_64")]
    return std::arch::is_x86_feature_detected!("aes")
        && std::arch::is_x86_feature_detected!("pclmulqdq");
    #[cfg(target_arch = "aarch64")]
    return std::arch::is_aarch64_feature_detected!("aes");
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    return false;
}

/// Accepts the one certificate, signed by itself, that carries an identity.
#[derive(Debug)]
struct IdentityVerifier {
    expected: Option<PeerId>,
}

impl IdentityVerifier {
    fn verify(
        &self,
        certificate: &CertificateDer<'_>,
        others: &[CertificateDer<'_>],
    ) -> Result<(), rustls::Error> {
        if !others.is_empty() {
            return Err(rustls::Error::General("a node shows one certificate".into()));
        }
        let peer = certificate::parse(certificate)?.peer_id();
        if self.expected.is_some_and(|expected| expected != peer) {
            let wrong = CertificateError::ApplicationVerificationFailure;
            return Err(rustls::Error::InvalidCertificate(wrong));
        }
        Ok(())
    }
}

fn verify_signature(
    message: &[u8],
    certificate: &CertificateDer<'_>,
    signed: &DigitallySignedStruct,
) -> Result<HandshakeSignatureValid, rustls::Error> {
    let certificate = certificate::parse(certificate)?;
    certificate.verify_signature(signed.scheme, message, signed.signature())?;
    Ok(HandshakeSignatureValid::assertion())
}

fn never_tls12() -> Result<HandshakeSignatureValid, rustls::Error> {
    Err(rustls::Error::General("TLS 1.2 is not spoken here".into()))
}

impl ServerCertVerifier for IdentityVerifier {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        others: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.verify(certificate, others).map(|()| ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        never_tls12()
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        SCHEMES.to_vec()
    }
}

impl ClientCertVerifier for IdentityVerifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        certificate: &CertificateDer<'_>,
        others: &[CertificateDer<'_>],
        _: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        self.verify(certificate, others).map(|()| ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        never_tls12()
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        SCHEMES.to_vec()
    }
}

/// Secures the links of a node.
#[derive(Clone)]
pub struct LinkTls {
    server: Arc<ServerConfig>,
    client: Arc<ClientConfig>,
}

/// A secured link.
pub type Secured<C> = Gathered<TlsStream<BufReader<C>>>;

impl LinkTls {
    /// For the node of this identity.
    ///
    /// # Errors
    /// [`TlsError`].
    pub fn new(identity: &Keypair) -> Result<Self, TlsError> {
        let mut server = server_config(identity)?;
        server.alpn_protocols = vec![ALPN.to_vec()];
        // The swarm checks that the peer is the one that it dialled.
        let mut client = client_config(identity, None)?;
        client.alpn_protocols = vec![ALPN.to_vec()];
        // The specification wants no name, and an address stands for none.
        client.enable_sni = false;
        Ok(Self { server: Arc::new(server), client: Arc::new(client) })
    }
}

fn secured<C>(stream: TlsStream<BufReader<C>>) -> Result<(PeerId, Secured<C>), TlsError> {
    let shown = stream.get_ref().1.peer_certificates();
    let Some([certificate]) = shown else { return Err(TlsError::NoCertificate) };
    let peer = certificate::parse(certificate)?.peer_id();
    Ok((peer, Gathered::new(stream)))
}

impl UpgradeInfo for LinkTls {
    type Info = &'static str;
    type InfoIter = std::iter::Once<Self::Info>;

    fn protocol_info(&self) -> Self::InfoIter {
        std::iter::once(PROTOCOL)
    }
}

impl<C> InboundConnectionUpgrade<C> for LinkTls
where
    C: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    type Output = (PeerId, Secured<C>);
    type Error = TlsError;
    type Future = BoxFuture<'static, Result<Self::Output, Self::Error>>;

    fn upgrade_inbound(self, connection: C, _: Self::Info) -> Self::Future {
        Box::pin(async move {
            let connection = BufReader::with_capacity(READ_BYTES, connection);
            let stream = TlsAcceptor::from(self.server).accept(connection).await?;
            secured(stream.into())
        })
    }
}

impl<C> OutboundConnectionUpgrade<C> for LinkTls
where
    C: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    type Output = (PeerId, Secured<C>);
    type Error = TlsError;
    type Future = BoxFuture<'static, Result<Self::Output, Self::Error>>;

    fn upgrade_outbound(self, connection: C, _: Self::Info) -> Self::Future {
        Box::pin(async move {
            let name = ServerName::IpAddress(IpAddr::V4(Ipv4Addr::UNSPECIFIED).into());
            let connection = BufReader::with_capacity(READ_BYTES, connection);
            let stream = TlsConnector::from(self.client).connect(name, connection).await?;
            secured(stream.into())
        })
    }
}

/// Gathers writes. A flush right after a write is put off until the task's next turn, so that what
/// is written until then goes along; a second one, and `GATHERED_BYTES`, are not put off.
pub struct Gathered<S> {
    inner: S,
    waiting: Vec<u8>,
    /// Bytes of `waiting` that have left.
    left: usize,
    /// Something was written since the last flush.
    is_fresh: bool,
}

impl<S> Gathered<S> {
    fn new(inner: S) -> Self {
        Self { inner, waiting: Vec::new(), left: 0, is_fresh: false }
    }
}

impl<S: AsyncWrite + Unpin> Gathered<S> {
    fn poll_leave(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.left < self.waiting.len() {
            let written = Pin::new(&mut self.inner).poll_write(context, &self.waiting[self.left..]);
            match ready!(written)? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                written => self.left += written,
            }
        }
        self.waiting.clear();
        self.left = 0;
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Gathered<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_read(context, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Gathered<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        if self.waiting.len() >= GATHERED_BYTES {
            ready!(self.poll_leave(context))?;
        }
        let room = GATHERED_BYTES - self.waiting.len();
        let taken = &bytes[..bytes.len().min(room)];
        self.waiting.extend_from_slice(taken);
        self.is_fresh = true;
        Poll::Ready(Ok(taken.len()))
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        if std::mem::take(&mut self.is_fresh) && self.waiting.len() < GATHERED_BYTES {
            context.waker().wake_by_ref();
            return Poll::Pending;
        }
        ready!(self.poll_leave(context))?;
        Pin::new(&mut self.inner).poll_flush(context)
    }

    fn poll_close(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_leave(context))?;
        Pin::new(&mut self.inner).poll_close(context)
    }
}

#[cfg(test)]
mod tests {
    use futures::{AsyncReadExt, AsyncWriteExt, FutureExt, future};
    use tokio_util::compat::TokioAsyncReadCompatExt;

    use super::*;

    /// A handshake of two nodes: what each end has, and the cipher.
    async fn handshake(
        client: ClientConfig,
        server: &Keypair,
    ) -> (Result<PeerId, TlsError>, Option<rustls::CipherSuite>) {
        let (near, far) = tokio::io::duplex(1 << 16);
        let server = LinkTls::new(server).unwrap();
        let accepting = server.upgrade_inbound(far.compat(), PROTOCOL);
        let client = LinkTls { client: Arc::new(client), ..LinkTls::new(&key()).unwrap() };
        let dialling = client.upgrade_outbound(near.compat(), PROTOCOL);
        let (dialled, _accepted) = future::join(dialling, accepting).await;
        match dialled {
            Ok((peer, link)) => {
                let suite = link.inner.get_ref().1.negotiated_cipher_suite();
                (Ok(peer), suite.map(|suite| suite.suite()))
            }
            Err(error) => (Err(error), None),
        }
    }

    fn key() -> Keypair {
        Keypair::generate_ed25519()
    }

    #[tokio::test]
    async fn ends_know_each_other_and_take_the_fast_cipher() {
        let (client, server) = (key(), key());
        let expected = server.public().to_peer_id();
        let (peer, suite) =
            handshake(client_config(&client, Some(expected)).unwrap(), &server).await;
        assert_eq!(peer.unwrap(), expected);
        let fast = match has_aes() {
            true => rustls::CipherSuite::TLS13_AES_128_GCM_SHA256,
            false => rustls::CipherSuite::TLS13_CHACHA20_POLY1305_SHA256,
        };
        assert_eq!(suite, Some(fast));
        let (peer, _) = handshake(client_config(&client, None).unwrap(), &server).await;
        assert_eq!(peer.unwrap(), expected, "whoever it is");
    }

    #[tokio::test]
    async fn another_node_than_the_expected_is_refused() {
        let other = key().public().to_peer_id();
        let (peer, _) = handshake(client_config(&key(), Some(other)).unwrap(), &key()).await;
        assert!(matches!(peer, Err(TlsError::Io(_))), "{peer:?}");
    }

    #[tokio::test]
    async fn the_library_and_we_speak_the_same_tls() {
        let (ours, theirs) = (key(), key());
        for we_dial in [true, false] {
            let (near, far) = tokio::io::duplex(1 << 16);
            let (near, far) = (near.compat(), far.compat());
            let our = LinkTls::new(&ours).unwrap();
            let their = libp2p_tls::Config::new(&theirs).unwrap();
            let (seen_by_us, seen_by_them) = if we_dial {
                let (a, b) = future::join(
                    our.upgrade_outbound(near, PROTOCOL),
                    their.upgrade_inbound(far, PROTOCOL),
                )
                .await;
                (a.unwrap().0, b.unwrap().0)
            } else {
                let (a, b) = future::join(
                    our.upgrade_inbound(far, PROTOCOL),
                    their.upgrade_outbound(near, PROTOCOL),
                )
                .await;
                (a.unwrap().0, b.unwrap().0)
            };
            assert_eq!(seen_by_us, theirs.public().to_peer_id());
            assert_eq!(seen_by_them, ours.public().to_peer_id());
        }
    }

    #[tokio::test]
    async fn writes_leave_together_in_order_and_at_the_latest_when_there_are_many() {
        let (near, far) = tokio::io::duplex(1 << 20);
        let (mut gathered, mut far) = (Gathered::new(near.compat()), far.compat());
        let mut buffer = vec![0; 1 << 20];
        gathered.write_all(b"one").await.unwrap();
        assert!(gathered.flush().now_or_never().is_none(), "put off, with a wake-up");
        gathered.write_all(b"two").await.unwrap();
        assert!(far.read(&mut buffer).now_or_never().is_none());
        gathered.flush().await.unwrap();
        let read = far.read(&mut buffer).await.unwrap();
        assert_eq!(&buffer[..read], b"onetwo");
        let much: Vec<u8> = (0..GATHERED_BYTES + 5).map(|n| n as u8).collect();
        gathered.write_all(&much).await.unwrap();
        far.read_exact(&mut buffer[..GATHERED_BYTES]).await.unwrap();
        gathered.close().await.unwrap();
        far.read_exact(&mut buffer[GATHERED_BYTES..much.len()]).await.unwrap();
        assert_eq!(buffer[..much.len()], much);
    }
}
