// A node of js-libp2p meets a node of meshwise: `node interop.mjs PROGRAM DATA_DIR`, with a node that
// holds its network's root key running on DATA_DIR. Ends with 1 and says what went wrong.

import './polyfill.mjs'
import assert from 'node:assert/strict'
import { execFile } from 'node:child_process'
import { createPublicKey, verify } from 'node:crypto'
import { setTimeout as sleep } from 'node:timers/promises'
import { promisify } from 'node:util'
import { generateKeyPair } from '@libp2p/crypto/keys'
import { identify } from '@libp2p/identify'
import { kadDHT, passthroughMapper } from '@libp2p/kad-dht'
import { noise } from '@libp2p/noise'
import { ping } from '@libp2p/ping'
import { tcp } from '@libp2p/tcp'
import { byteStream } from '@libp2p/utils'
import { yamux } from '@libp2p/yamux'
import { multiaddr } from '@multiformats/multiaddr'
import { createLibp2p } from 'libp2p'

const [program, dataDir] = process.argv.slice(2)
const NAME = 'files.local'
// The steps of admission, by their number on the wire.
const HELLO = 0
const WELCOME = 1
const REFUSED = 2
const READY = 3
const ANSWER_MS = 20_000

const run = promisify(execFile)
const text = new TextEncoder()

async function ask (...command) {
  const { stdout } = await run(program, [...command, '--json', '--data-dir', dataDir])
  return JSON.parse(stdout)
}

// Reads postcard: little-endian numbers of seven bits a byte, and bytes after their number.
class Reader {
  constructor (bytes) { this.bytes = bytes; this.at = 0 }
  take (count) {
    assert(this.at + count <= this.bytes.length, 'cut off')
    return this.bytes.subarray(this.at, this.at += count)
  }
  number () {
    for (let value = 0n, shift = 0n; ; shift += 7n) {
      const byte = this.take(1)[0]
      value |= BigInt(byte & 127) << shift
      if (byte < 128) return Number(value)
    }
  }
  sized () { return this.take(this.number()) }
  rest () { return this.bytes.subarray(this.at) }
}

// Whom a certificate is for, and the credential in it, as it is shown.
function certificate (token) {
  const reader = new Reader(Buffer.from(token.replace(/^meshwise-certificate-1-/, ''), 'base64url'))
  const name = Buffer.from(reader.sized()).toString()
  const [root, issuer, key] = [reader.take(32), reader.take(32), reader.take(32)]
  return { name, root, issuer, key, credential: reader.rest() }
}

function verified (domain, { key, body, signature }) {
  const der = Buffer.concat([Buffer.from('302a300506032b6570032100', 'hex'), key])
  const publicKey = createPublicKey({ key: der, format: 'der', type: 'spki' })
  return verify(null, Buffer.concat([text.encode(domain), body]), publicKey, signature)
}

// What the other side says to this credential: a welcome's rest, or the text of a refusal.
async function show (connection, protocol, credential) {
  const stream = byteStream(await connection.newStream(protocol))
  const send = async (...parts) => {
    const frame = Buffer.concat(parts.map(part => Buffer.from(part)))
    await stream.write(Buffer.concat([Buffer.from([frame.length >> 8, frame.length & 255]), frame]))
  }
  await send([HELLO], credential)
  const [high, low] = (await stream.read({ bytes: 2 })).subarray()
  const reader = new Reader((await stream.read({ bytes: high << 8 | low })).subarray())
  const step = reader.number()
  if (step === REFUSED) return { refused: Buffer.from(reader.sized()).toString() }
  assert.equal(step, WELCOME)
  await send([READY])
  return { welcome: reader.rest() }
}

async function until (what, isSo) {
  for (const begun = Date.now(); !await isSo(); await sleep(50)) {
    assert(Date.now() - begun < ANSWER_MS, `not within ${ANSWER_MS} ms: ${what}`)
  }
}

const status = await ask('status')
const root = (await ask('network', 'show')).root
const address = multiaddr(status.listening.find(text => text.includes('/tcp/')))
await ask('service', 'publish', NAME, '--to', 'tcp://127.0.0.1:9')

const privateKey = await generateKeyPair('Ed25519')
let network
const node = async () => await createLibp2p({
  privateKey,
  addresses: { listen: ['/ip4/127.0.0.1/tcp/0'] },
  transports: [tcp()],
  connectionEncrypters: [noise()],
  streamMuxers: [yamux()],
  services: {
    // The stranger asks itself.
    identify: identify({ runOnConnectionOpen: network != null }),
    ping: ping(),
    ...(network == null
      ? {}
      : {
          dht: kadDHT({
            protocol: `${network}/kad/1`,
            clientMode: true,
            // The default leaves out private addresses.
            peerInfoMapper: passthroughMapper,
            validators: { meshwise: async () => {} },
            selectors: { meshwise: () => 0 }
          })
        })
  }
})

// 1. Identify and ping, as with any node.
const stranger = await node()
let connection = await stranger.dial(address)
const about = await stranger.services.identify.identify(connection)
assert.match(about.agentVersion, /^meshwise\//)
const admission = about.protocols.find(name => name.endsWith('/admission/1'))
assert(admission, `no admission among ${about.protocols}`)
assert(!about.protocols.some(name => /kad|meshsub|sync|link/.test(name)), `${about.protocols}`)
const rtt = await stranger.services.ping.ping(connection.remotePeer)
console.log(`identified ${about.agentVersion}, ping ${rtt} ms`)
network = admission.replace(/\/admission\/1$/, '')

// 2. Without a credential it is told why it may not join.
const nothing = [0, 0, 0]
const { refused } = await show(connection, admission, nothing)
assert.match(refused, /no credential of this network.*meshwise network invite/)
console.log(`refused: ${refused}`)
await until('the stranger is disconnected', () => stranger.getConnections().length === 0)
await stranger.stop()

// 3. With a certificate made for its key it is a member.
const member = await node()
const { token } = await ask('network', 'certify', member.peerId.toString())
const shown = certificate(token)
assert.equal(Buffer.from(shown.key).toString('hex'), Buffer.from(privateKey.publicKey.raw).toString('hex'))
connection = await member.dial(address)
const { welcome, refused: why } = await show(connection, admission, shown.credential)
assert(welcome, `refused: ${why}`)
console.log(`admitted to '${shown.name}' (root ${root})`)
await until('the node counts it as a peer', async () => {
  const peers = await ask('peer', 'list')
  return peers.some(peer => peer.peer_id === member.peerId.toString())
})

// 4. It looks a service up in the node's Kademlia.
// What it speaks with members it did not say before.
await member.services.identify.identify(connection)
await until('the node is in the routing table', () => member.services.dht.routingTable.size > 0)
const provider = connection.remotePeer.publicKey.raw
const key = Buffer.concat([text.encode(`/meshwise/service/${NAME}/`), provider])
let value
for await (const event of member.services.dht.get(key, { signal: AbortSignal.timeout(ANSWER_MS) })) {
  if (event.name === 'VALUE') value = event.value
}
assert(value, `${NAME} was not found`)
const reader = new Reader(value)
const record = { key: reader.take(32) }
reader.number()
reader.number()
reader.sized()
record.body = reader.sized()
record.signature = reader.sized()
assert(verified('meshwise/service/2\0', record), 'the signature of the record')
assert.deepEqual(Buffer.from(record.key), Buffer.from(provider))
assert.equal(Buffer.from(new Reader(record.body).sized()).toString(), NAME)
console.log(`found ${NAME}: ${value.length} bytes, signed by ${connection.remotePeer}`)
await member.stop()
