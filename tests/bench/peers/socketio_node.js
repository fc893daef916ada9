// The tracking room as the manuals of Socket.IO for Node and of its Redis adapter build it.
// usage: node socketio_node.js PORT REDIS_URL JWT_SECRET
const http = require("node:http");
const { createAdapter } = require("@socket.io/redis-adapter");
const jwt = require("jsonwebtoken");
const { createClient } = require("redis");
const { Server } = require("socket.io");

const [port, redisUrl, secret] = process.argv.slice(2);
const room = (data) => `order:${data.orderId}`;

async function main() {
  const publisher = createClient(
    redisUrl.startsWith("unix://") ? { socket: { path: redisUrl.slice("unix://".length) } } : { url: redisUrl },
  );
  const subscriber = publisher.duplicate();
  await Promise.all([publisher.connect(), subscriber.connect()]);

  const web = http.createServer((request, response) => {
    response.writeHead(200, { "Content-Type": "application/json" }).end('{"status":"alive"}');
  });
  const io = new Server(web, { adapter: createAdapter(publisher, subscriber) });
  io.use((socket, next) => {
    jwt.verify(socket.handshake.auth.token, secret, { algorithms: ["HS256"] }, (error, claims) => {
      socket.data.claims = claims;
      next(error ?? undefined);
    });
  });
  io.on("connection", (socket) => {
    socket.on("subscribeToOrder", (data, answer) => {
      socket.join(room(data));
      answer({ ok: true });
    });
    socket.on("updateLocation", (data) => socket.to(room(data)).emit("orderLocationUpdate", data));
  });
  web.listen({ port: Number(port), host: "127.0.0.1" });
}

main();
