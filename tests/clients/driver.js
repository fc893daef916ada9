// Drives the official socket.io-client from outside: commands as JSON lines on stdin, what happens as JSON lines on stdout,
// in the order in which the client's callbacks run. tests/flows/official.py is the other end.
//
//   {do: "open", socket, url, options}        a socket with a connection of its own; `options` go to io() as they are
//   {do: "emit", socket, call, event, args}   an event whose acknowledgement is awaited in the callback form
//   {do: "send", socket, event, args}         an event without acknowledgement
//   {do: "auth", socket, auth}                what the next connection of this socket authenticates with
//   {do: "connect" | "close", socket}
//   {do: "lose", socket, url}                 the transport is lost without a goodbye; the client comes back to `url`
//
//   {socket, what: "open", transport}   {socket, what: "upgrade", transport}   {socket, what: "connect", id, recovered}
//   {socket, what: "connect_error", message, data, active}
//   {socket, what: "disconnect", reason, active}          `active`: the client comes back by itself
//   {socket, what: "reconnect", attempt}
//   {socket, what: "event", name, args}                   {socket, what: "ack", call, args}
import { createInterface } from "node:readline";
import { io } from "socket.io-client";

const sockets = new Map();

function open(name, url, options) {
  const tell = (what, more) => process.stdout.write(JSON.stringify({ socket: name, what, ...more }) + "\n");
  const socket = io(url, { forceNew: true, ...options });
  socket.io.on("open", () => {
    const { engine } = socket.io;
    tell("open", { transport: engine.transport.name });
    engine.on("upgrade", (transport) => tell("upgrade", { transport: transport.name }));
  });
  socket.on("connect", () => tell("connect", { id: socket.id, recovered: Boolean(socket.recovered) }));
  socket.on("connect_error", (error) =>
    tell("connect_error", { message: error.message, data: error.data, active: socket.active }),
  );
  socket.on("disconnect", (reason) => tell("disconnect", { reason, active: socket.active }));
  socket.io.on("reconnect", (attempt) => tell("reconnect", { attempt }));
  socket.onAny((event, ...args) => tell("event", { name: event, args }));
  sockets.set(name, { socket, tell });
}

createInterface({ input: process.stdin })
  .on("line", (line) => {
    const command = JSON.parse(line);
    if (command.do === "open") {
      open(command.socket, command.url, command.options);
      return;
    }
    const { socket, tell } = sockets.get(command.socket);
    switch (command.do) {
      case "emit":
        socket.emit(command.event, ...command.args, (...args) => tell("ack", { call: command.call, args }));
        break;
      case "send":
        socket.emit(command.event, ...command.args);
        break;
      case "auth":
        socket.auth = command.auth;
        break;
      case "connect":
        socket.connect();
        break;
      case "close":
        socket.close();
        break;
      case "lose":
        socket.io.uri = command.url;
        socket.io.engine.close();
        break;
      default:
        throw new Error(`no such command: ${line}`);
    }
  })
  .on("close", () => {
    for (const { socket } of sockets.values()) socket.close();
  });
