// What js-libp2p expects of Node.js 22, for Node.js 20.
Promise.withResolvers ??= function () {
  let resolve, reject
  const promise = new Promise((one, other) => { resolve = one; reject = other })
  return { promise, resolve, reject }
}
