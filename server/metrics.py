"""What is measured, in Prometheus' terms. Every name is here; `docs/operations.md` says what to watch."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

requests = Counter("waybill_http_requests_total", "Answered requests.", ["method", "route", "status"])
request_seconds = Histogram(
    "waybill_http_request_seconds",
    "Time from the first byte of a request to its answer.",
    ["method", "route"],
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5),
)
socket_events = Counter("waybill_socket_events_total", "Events received on sockets.", ["event", "outcome"])
connections = Gauge("waybill_connections", "Sockets connected to this process.")
drained = Counter("waybill_drained_total", "Sockets that were sent elsewhere because the process stops.")
connections_open = Gauge("waybill_connections_open", "Open connections of any kind, idle ones too.")
connections_max = Gauge("waybill_connections_max", "How many of them this process takes; 0: no limit.")
watched_orders = Gauge("waybill_watched_orders", "Orders that somebody watches on this process.")
watchers = Gauge("waybill_watchers", "How many subscriptions to them the sockets of this process have.")
revocations_overdue = Counter(
    "waybill_revocations_overdue_total", "How often the bus was believed although revocations could not be read."
)
expelled = Counter("waybill_expelled_total", "Sessions that the server ended.", ["code"])
events_published = Counter("waybill_events_published_total", "Order events handed to Redis.", ["by"])
events_marked = Counter("waybill_events_marked_sent_total", "Order events marked as sent.")
positions = Counter("waybill_positions_total", "Positions received from agents.", ["outcome"])
trail_stored = Counter("waybill_trail_stored_total", "Positions written to the trail.")
trail_dropped = Counter("waybill_trail_dropped_total", "Positions that the trail had no room for.")
snapshots = Counter(
    "waybill_snapshots_total", "Subscribes that were answered, from memory or from the table.", ["source"]
)
batch_size = Histogram(
    "waybill_batch_questions",
    "How many questions of subscribers and agents one statement answered.",
    ["what"],
    buckets=(1, 2, 5, 10, 20, 50, 100, 200, 500, 1000),
)
gaps_filled = Counter("waybill_gap_events_total", "Order events that were read from the table instead of the bus.")
rate_limited = Counter("waybill_rate_limited_total", "Requests, events and handshakes over a rate.", ["rate"])
rates_not_counted = Counter(
    "waybill_rates_not_counted_total", "Let through uncounted, because Redis was away, late or in error.", ["why"]
)
coalesced = Counter("waybill_coalesced_total", "Positions that were replaced by a newer one for a slow reader.")
event_delivery_seconds = Histogram(
    "waybill_event_delivery_seconds",
    "From when an order event was recorded to when its watchers here get it.",
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
)
recoveries = Counter(
    "waybill_recoveries_total", "Clients that came back with a session: recovered, or why it was lost.", ["outcome"]
)
connections_cut = Counter(
    "waybill_connections_cut_total", "Connections that were closed because the client took too long.", ["why"]
)
events_unsent = Gauge("waybill_events_unsent", "Order events that are not marked as sent.")
oldest_unsent = Gauge("waybill_oldest_unsent_seconds", "Age of the oldest of them; 0 when there is none.")
jobs = Counter(
    "waybill_jobs_total",
    "Runs of background jobs: done, asked_again, retried after a failure, dead, parked; taken_over from a dead worker.",
    ["name", "outcome"],
)
job_seconds = Histogram(
    "waybill_job_seconds",
    "How long runs of background jobs take.",
    ["name"],
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
)
jobs_waiting = Gauge("waybill_jobs_waiting", "Background jobs that are due and not begun.")
oldest_job = Gauge("waybill_oldest_job_seconds", "How long the oldest of them is overdue; 0 when there is none.")
jobs_held = Gauge("waybill_jobs_held", "Background jobs that nobody runs until staff decides: dead or parked.", ["why"])
webhooks_received = Counter(
    "waybill_webhooks_received_total",
    "Webhooks at the door: stored, repeated, unsigned (its signature is wrong), not_stored.",
    ["provider", "outcome"],
)
webhooks_tried = Counter(
    "waybill_webhooks_tried_total",
    "Tries to apply a webhook: applied, parked, failed, dead, away (Postgres did not answer), taken by somebody else.",
    ["provider", "outcome"],
)
webhooks_left = Gauge("waybill_webhooks_left", "Webhooks that are not applied: parked, or dead.", ["why"])
oldest_webhook = Gauge(
    "waybill_oldest_webhook_seconds", "How long the webhook that waits longest is due; 0 when none is."
)
books_differ = Counter(
    "waybill_reconciliation_differences_total",
    "Captures of which a gateway's books and ours did not say the same, by the daily reports.",
    ["provider", "kind"],
)
bus_up = Gauge("waybill_bus_up", "1 while Redis answers.")
bus_losses = Counter("waybill_bus_losses_total", "How often Redis was lost.")
bus_passed_over = Counter(
    "waybill_bus_passed_over_total", "Messages of a bus that had just come back, before revocations were read."
)
database_up = Gauge("waybill_database_up", "1 while Postgres answers.")
db_connections = Gauge("waybill_db_connections", "Connections of this process to Postgres.", ["state"])
db_pool_size = Gauge("waybill_db_pool_size", "The most connections to Postgres that this process opens.")
ready = Gauge("waybill_ready", "1 while /health/ready answers 200.")
gateway_open = Gauge(
    "waybill_gateway_breaker_open", "1 while a payment gateway is not offered because it did not answer.", ["provider"]
)
gateway_calls = Counter(
    "waybill_gateway_calls_total", "Questions to payment gateways.", ["provider", "operation", "outcome"]
)
gateway_call_seconds = Histogram(
    "waybill_gateway_call_seconds",
    "Time from a question to its answer, or to giving up.",
    ["provider", "operation"],
    buckets=(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
)
loop_lag_seconds = Histogram(
    "waybill_loop_lag_seconds",
    "How much later than asked the event loop comes round; while it lags, everything waits.",
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5),
)
