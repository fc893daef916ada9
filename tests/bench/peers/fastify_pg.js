// Placing an order with Fastify and pg: the order, its lines and its first event in one transaction. And storing a
// signed webhook, as the same row of the same table that we write.
// usage: node fastify_pg.js PORT DATABASE_URL JWT_SECRET
const { createHmac, randomUUID, timingSafeEqual } = require("node:crypto");
const fastify = require("fastify");
const jwt = require("jsonwebtoken");
const { Pool } = require("pg");

const [port, connectionString, secret] = process.argv.slice(2);
const TABLES = `
  CREATE TABLE fastify_orders (
    id uuid PRIMARY KEY, customer text NOT NULL, currency text NOT NULL, status text NOT NULL, total bigint NOT NULL,
    address jsonb, placed_at timestamptz NOT NULL DEFAULT now());
  CREATE TABLE fastify_lines (
    order_id uuid NOT NULL REFERENCES fastify_orders, line int NOT NULL, name text NOT NULL, quantity int NOT NULL,
    unit_price bigint NOT NULL, PRIMARY KEY (order_id, line));
  CREATE TABLE fastify_events (
    order_id uuid NOT NULL REFERENCES fastify_orders, seq int NOT NULL, type text NOT NULL, payload jsonb NOT NULL,
    PRIMARY KEY (order_id, seq));`;
// A name makes a statement prepared.
const PLACE = {
  name: "place",
  text:
    "INSERT INTO fastify_orders (id, customer, currency, status, total, address) " +
    "VALUES ($1, $2, $3, 'pending', $4, $5)",
};
const ADD_LINE = { name: "line", text: "INSERT INTO fastify_lines VALUES ($1, $2, $3, $4, $5)" };
const ADD_EVENT = { name: "event", text: "INSERT INTO fastify_events VALUES ($1, 1, 'orderStatusUpdate', $2)" };
const STORE = {
  name: "store",
  text:
    "INSERT INTO webhooks (id, provider, event_id, kind, refs, body, status, received_at, next_at) " +
    "VALUES ($1, 'razorpay', $2, $3, $4, $5, 'received', $6, $6) ON CONFLICT DO NOTHING",
};

async function main() {
  const pool = new Pool({ connectionString, max: 10 });
  await pool.query(TABLES);
  const app = fastify();
  app.get("/health/live", async () => ({ status: "alive" }));
  app.post("/api/v1/orders", async (request, reply) => {
    const claims = jwt.verify(request.headers.authorization.replace("Bearer ", ""), secret, { algorithms: ["HS256"] });
    const { customerId, currency, items, deliveryAddress } = request.body;
    const id = randomUUID();
    const total = items.reduce((sum, item) => sum + item.quantity * item.unitPrice, 0);
    const client = await pool.connect();
    try {
      await client.query("BEGIN");
      await client.query({ ...PLACE, values: [id, customerId, currency, total, deliveryAddress] });
      for (const [line, item] of items.entries()) {
        await client.query({ ...ADD_LINE, values: [id, line, item.name, item.quantity, item.unitPrice] });
      }
      await client.query({ ...ADD_EVENT, values: [id, { orderId: id, status: "pending", actor: claims.sub }] });
      await client.query("COMMIT");
    } catch (error) {
      await client.query("ROLLBACK");
      throw error;
    } finally {
      client.release();
    }
    reply.code(201);
    return { id, status: "pending", seq: 1, currency, items, total };
  });
  app.register(async (door) => {
    door.removeContentTypeParser("application/json");
    // The body as it came: it is what is signed.
    door.addContentTypeParser("application/json", { parseAs: "buffer" }, (request, body, done) => done(null, body));
    door.post("/api/v1/webhooks/razorpay", async (request, reply) => {
      const { "x-razorpay-signature": signature = "", "x-razorpay-event-id": eventId } = request.headers;
      const given = Buffer.from(signature, "hex");
      const made = createHmac("sha256", secret).update(request.body).digest();
      if (given.length !== made.length || !timingSafeEqual(given, made)) {
        reply.code(400);
        return { code: "bad_signature" };
      }
      const { event, payload } = JSON.parse(request.body);
      const { id, order_id } = payload.payment.entity;
      await pool.query({ ...STORE, values: [randomUUID(), eventId, event, [order_id, id], request.body, new Date()] });
      return {};
    });
  });
  await app.listen({ port: Number(port), host: "127.0.0.1" });
}

main();
