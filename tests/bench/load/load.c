// Many Socket.IO clients in one process: they watch orders, push positions, change orders over REST, and write down
// which events came. Speaks Engine.IO 4 and Socket.IO 5 over WebSocket, and HTTP/1.1.
//
// usage: load PLAN      PLAN has one line per order and client; see read_plan()
//
// It is told what to do on its standard input, one command a line; each is answered with one line of JSON, `state`:
//   connect IN_FLIGHT [replay]    open all sockets, at most so many at once; `replay` asks for the events since afterSeq
//   rejoin PORT                   from now on a socket that is lost comes back at once, to this port
//   push RATE                     every agent pushes so many positions a second; 0 stops
//   move PORT RATE CONNECTIONS    POST the next status of one order after the other, so many a second
//   place PORT CONNECTIONS FILE   POST an order with this body, again as soon as the last one is answered
//   deliver PORT RATE CONNECTIONS FILE    POST the webhooks of FILE, each once, so many a second; 0: as they are answered
//   rest                          no further POSTs
//   reset                         forget the durations and counts of positions and POSTs
//   state                         what happened so far
//   heard FILE                    write the events of every watcher to FILE: one line each, "order seq:type:status …"
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "histogram.h"
#include "json.h"

enum { READ_BYTES = 256 * 1024, EVENTS_AT_ONCE = 1024, MOVES_FIRST = 4, REST_MS = 100 };
static const uint64_t SECOND = 1000000000u;

typedef struct {
  char id[64];
  unsigned watchers, moves, steps;
  bool moving, unsure;  // `unsure`: a move was not confirmed, and may have been made all the same
  uint64_t delivered_at;
} Order;

typedef struct {
  uint32_t seq;
  char type[28], status[24];
} Event;

// What both kinds of connection have: bytes that wait for their rest, and bytes that wait to be written.
typedef struct {
  enum { SOCKET, POSTER } kind;
  int fd;
  char *partial, *unwritten;
  size_t partial_length, unwritten_length;
} Link;

typedef struct {
  Link link;
  enum { IDLE, CONNECTING, UPGRADING, OPENING, JOINING, SUBSCRIBING, READY } state;
  bool agent, was_ready;
  unsigned port, order;
  char *token;
  uint64_t started_at, lost_at, retry_at, last_ts_us;
  uint32_t last_seq;
  Event *events;
  size_t events_count, events_room;
} Socket;

typedef struct {
  Link link;
  bool connected, busy;
  unsigned order;
  uint64_t due;
} Poster;

typedef struct {
  int order;  // its number; -1: none of ours
  char *signature, *event_id, *body;
} Webhook;

static Order *orders;
static Socket *sockets;
static Poster *posters;
static unsigned orders_count, sockets_count, posters_count;
static char *service_header;
static int epoll;
static char read_buffer[READ_BYTES];

static unsigned in_flight_max, started_count, settled_count;
static bool replay;
static unsigned rejoin_port;
static uint64_t push_interval, push_due;
static unsigned push_next;
static unsigned post_port;
static uint64_t post_interval, post_due;
static unsigned move_next;
static bool posting;
static enum { MOVES, PLACES, WEBHOOKS } posts;
static char *place_body;
static Webhook *webhooks;
static unsigned webhooks_count, webhook_next;

static struct {
  unsigned long long ready, failed, lost, retries, bad_answers, not_understood;
  unsigned long long pushed, blocked, due, shown, old_positions, events;
  unsigned long long posted, answered, refused;
  uint64_t last_ready_at;
  char why[256];
} counts;
static Histogram connecting, rejoining, showing, telling, answering;

static uint64_t now(void) { return nanoseconds(CLOCK_MONOTONIC); }
static uint64_t wall(void) { return nanoseconds(CLOCK_REALTIME); }

static void stop(const char *why) {
  fprintf(stderr, "load: %s\n", why);
  exit(2);
}

static void *grown(void *memory, size_t bytes) {
  void *more = realloc(memory, bytes);
  if (more == NULL) stop("out of memory");
  return more;
}

// Keeps the first reason: the later ones follow from it.
__attribute__((format(printf, 1, 2))) static void note_why(const char *format, ...) {
  if (counts.why[0]) return;
  va_list values;
  va_start(values, format);
  vsnprintf(counts.why, sizeof counts.why, format, values);
  va_end(values);
  for (char *at = counts.why; *at; at++)
    if (*at == '"' || *at == '\\' || (unsigned char)*at < 32 || (unsigned char)*at > 126) *at = '.';
}

// bytes in, bytes out

static void watch_link(Link *link, int operation, uint32_t events) {
  struct epoll_event wanted = {.events = events, .data.ptr = link};
  epoll_ctl(epoll, operation, link->fd, &wanted);
}

static void open_link(Link *link, unsigned port) {
  link->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
  if (link->fd < 0) stop("no more sockets: raise the limit of open files (ulimit -n)");
  int on = 1;
  setsockopt(link->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
  struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  if (connect(link->fd, (struct sockaddr *)&address, sizeof address) < 0 && errno == EADDRNOTAVAIL)
    stop("no more loopback ports: widen net.ipv4.ip_local_port_range");
  watch_link(link, EPOLL_CTL_ADD, EPOLLIN | EPOLLOUT);
}

static void close_link(Link *link) {
  if (link->fd >= 0) close(link->fd);
  free(link->partial), free(link->unwritten);
  link->fd = -1;
  link->partial = link->unwritten = NULL;
  link->partial_length = link->unwritten_length = 0;
}

static int link_error(const Link *link) {
  int error = 0;
  socklen_t size = sizeof error;
  getsockopt(link->fd, SOL_SOCKET, SO_ERROR, &error, &size);
  return error;
}

// Writes what waited. What the kernel does not take stays.
static void flush_link(Link *link) {
  ssize_t written = write(link->fd, link->unwritten, link->unwritten_length);
  if (written <= 0) return;  // an error is seen by the next read
  link->unwritten_length -= (size_t)written;
  memmove(link->unwritten, link->unwritten + written, link->unwritten_length);
  if (link->unwritten_length == 0) watch_link(link, EPOLL_CTL_MOD, EPOLLIN);
}

static void send_bytes(Link *link, const char *bytes, size_t length) {
  bool waiting = link->unwritten_length > 0;
  ssize_t written = waiting ? 0 : write(link->fd, bytes, length);
  if (written < 0) written = 0;
  if ((size_t)written == length) return;
  size_t left = length - (size_t)written;
  link->unwritten = grown(link->unwritten, link->unwritten_length + left);
  memcpy(link->unwritten + link->unwritten_length, bytes + written, left);
  link->unwritten_length += left;
  if (!waiting) watch_link(link, EPOLL_CTL_MOD, EPOLLIN | EPOLLOUT);
}

// Reads into `read_buffer`, behind what was kept. The length, or -1 when the other side is gone, or 0 for nothing yet.
static ssize_t receive(Link *link) {
  memcpy(read_buffer, link->partial ? link->partial : "", link->partial_length);
  size_t kept = link->partial_length;
  ssize_t length = recv(link->fd, read_buffer + kept, READ_BYTES - kept - 1, 0);
  if (length == 0 || (length < 0 && errno != EAGAIN)) return -1;
  if (length < 0) return 0;
  read_buffer[kept + (size_t)length] = 0;
  return (ssize_t)kept + length;
}

static void keep_rest(Link *link, const char *rest, size_t length) {
  if (length >= READ_BYTES - 1) stop("a message is longer than what is read at once");
  link->partial_length = length;
  if (length == 0) return;
  link->partial = grown(link->partial, length);
  memcpy(link->partial, rest, length);
}

// one Socket.IO client

static void start_socket(Socket *one, unsigned port) {
  one->port = port;
  one->state = CONNECTING;
  one->started_at = now();
  open_link(&one->link, port);
}

static void lose_socket(Socket *one, const char *why) {
  bool was_ready = one->state == READY;
  const int stage = one->state;
  close_link(&one->link);
  one->state = IDLE;
  if (was_ready) {
    counts.lost++, counts.ready--;
    one->lost_at = now();
  }
  if (rejoin_port) {
    // At once the first time; after a refusal as the JavaScript client does, which waits for 0.5 to 1.5 s.
    one->retry_at = was_ready ? one->lost_at : now() + SECOND / 2 + (uint64_t)rand() % SECOND;
    if (!was_ready) counts.retries++;
    return;
  }
  note_why("socket %u at stage %d: %s", (unsigned)(one - sockets), stage, why);
  if (!was_ready) counts.failed++, settled_count++;
}

static void send_text(Socket *one, const char *text, size_t length) {
  char frame[16 * 1024];
  size_t head = 2;
  if (length + 14 > sizeof frame) stop("a frame is too long");
  frame[0] = (char)0x81;
  if (length < 126) {
    frame[1] = (char)(0x80 | length);
  } else {
    frame[1] = (char)(0x80 | 126), frame[2] = (char)(length >> 8), frame[3] = (char)length;
    head = 4;
  }
  memset(frame + head, 0, 4);  // the mask: all zero leaves the text as it is
  memcpy(frame + head + 4, text, length);
  send_bytes(&one->link, frame, head + 4 + length);
}

static void settle(Socket *one) {
  one->state = READY;
  counts.ready++;
  counts.last_ready_at = now();
  if (one->was_ready) {
    histogram_add(&rejoining, counts.last_ready_at - one->lost_at);
  } else {
    histogram_add(&connecting, counts.last_ready_at - one->started_at);
    settled_count++;
  }
  one->was_ready = true;
}

static void join(Socket *one) {
  char text[12 * 1024];
  int length = snprintf(text, sizeof text, "40{\"token\":\"%s\"}", one->token);
  if (length >= (int)sizeof text) stop("a token is too long");
  one->state = JOINING;
  send_text(one, text, (size_t)length);
}

static void subscribe(Socket *one) {
  char text[256], after[32] = "";
  if (replay) snprintf(after, sizeof after, ",\"afterSeq\":%u", one->last_seq);
  int length =
      snprintf(text, sizeof text, "421[\"subscribeToOrder\",{\"orderId\":\"%s\"%s}]", orders[one->order].id, after);
  one->state = SUBSCRIBING;
  send_text(one, text, (size_t)length);
}

// Writes the event down as it came. Judging the list is not done here.
static void write_down(Socket *one, uint32_t seq, Slice type, Slice payload) {
  counts.events++;
  if (!replay) return;
  if (one->events_count == one->events_room) {
    one->events_room = one->events_room ? one->events_room * 2 : 8;
    one->events = grown(one->events, one->events_room * sizeof *one->events);
  }
  Event *event = &one->events[one->events_count++];
  event->seq = seq;
  json_copy(type, event->type, sizeof event->type);
  json_copy(json_member(payload, "status"), event->status, sizeof event->status);
  if (seq > one->last_seq) one->last_seq = seq;
}

static void take_answer(Socket *one, Slice arguments) {
  Slice answer = {NULL, NULL}, event;
  json_next(&arguments, &answer);
  if (!json_is_literal(json_member(answer, "ok"), "true")) {
    lose_socket(one, "the subscribe was refused");
    return;
  }
  Slice events = json_member(answer, "events");
  while (json_next(&events, &event)) {
    write_down(one, (uint32_t)json_number(json_member(event, "seq"), 0), json_member(event, "type"),
               json_member(event, "data"));
  }
  if (replay && json_number(json_member(answer, "seq"), -1) != one->last_seq) {
    counts.bad_answers++;
    note_why("socket %u: the answer's events do not end at its seq", (unsigned)(one - sockets));
  }
  settle(one);
}

static void take_event(Socket *one, Slice arguments) {
  Slice type = {NULL, NULL}, payload = {NULL, NULL};
  json_next(&arguments, &type);
  json_next(&arguments, &payload);
  if (json_is_string(type, "orderLocationUpdate")) {
    uint64_t at = wall(), ts_us = (uint64_t)(json_number(json_member(payload, "ts"), 0) * 1000 + .5);
    if (ts_us <= one->last_ts_us) {
      counts.old_positions++;
      return;
    }
    one->last_ts_us = ts_us;
    counts.shown++;
    if (at > ts_us * 1000) histogram_add(&showing, at - ts_us * 1000);
    return;
  }
  double seq = json_number(json_member(payload, "seq"), 0);
  if (seq < 1) return;
  write_down(one, (uint32_t)seq, type, payload);
  uint64_t delivered_at = orders[one->order].delivered_at;
  if (delivered_at && json_is_string(type, "paymentUpdate")) histogram_add(&telling, now() - delivered_at);
  char note[32];
  json_copy(json_member(payload, "note"), note, sizeof note);
  uint64_t due = strtoull(note, NULL, 10), at = now();
  if (due && at > due) histogram_add(&telling, at - due);
}

static void take_text(Socket *one, const char *text, size_t length) {
  const char *end = text + length, *at = text + 2;
  if (length == 1 && *text == '2') {
    send_text(one, "3", 1);
  } else if (*text == '0' && one->state == OPENING) {
    join(one);
  } else if (length > 1 && text[0] == '4' && text[1] == '0' && one->state == JOINING) {
    if (one->agent) settle(one);
    else subscribe(one);
  } else if (length > 1 && text[0] == '4' && text[1] == '2') {
    take_event(one, (Slice){at, end});
  } else if (length > 1 && text[0] == '4' && text[1] == '3' && one->state == SUBSCRIBING) {
    while (at < end && *at >= '0' && *at <= '9') at++;
    take_answer(one, (Slice){at, end});
  } else if (length > 1 && text[0] == '4' && (text[1] == '1' || text[1] == '4')) {
    lose_socket(one, "the server ended the session");
  } else {
    counts.not_understood++;
    note_why("socket %u: not understood: %.60s", (unsigned)(one - sockets), text);
  }
}

static void read_socket(Socket *one) {
  ssize_t length = receive(&one->link);
  if (length < 0) {
    lose_socket(one, "the connection ended");
    return;
  }
  char *at = read_buffer, *end = read_buffer + length;
  if (length && one->state == UPGRADING) {
    char *body = strstr(at, "\r\n\r\n");
    if (body == NULL) {
      keep_rest(&one->link, at, (size_t)(end - at));
      return;
    }
    if (strncmp(at, "HTTP/1.1 101", 12) != 0) {
      *strchr(at, '\r') = 0;
      lose_socket(one, at);
      return;
    }
    at = body + 4;
    one->state = OPENING;
  }
  while (end - at >= 2) {
    const unsigned char *head = (unsigned char *)at;
    size_t size = head[1] & 127, head_size = 2;
    if (size == 126) {
      if (end - at < 4) break;
      size = (size_t)head[2] << 8 | head[3], head_size = 4;
    } else if (size == 127) {
      if (end - at < 10) break;
      size = 0, head_size = 10;
      for (int i = 2; i < 10; i++) size = size << 8 | head[i];
    }
    if ((size_t)(end - at) < head_size + size) break;
    if (head[0] == 0x81) {
      take_text(one, at + head_size, size);
    } else if (head[0] == 0x89) {
      const char pong[] = {(char)0x8a, (char)0x80, 0, 0, 0, 0};
      send_bytes(&one->link, pong, sizeof pong);
    } else if (head[0] == 0x88) {
      lose_socket(one, "the server closed the WebSocket");
    } else {
      lose_socket(one, "a frame that is neither text nor control: fragmented, compressed or binary");
    }
    if (one->link.fd < 0) return;
    at += head_size + size;
  }
  if (length) keep_rest(&one->link, at, (size_t)(end - at));
}

static void on_socket(Socket *one, uint32_t events) {
  if (one->state == CONNECTING) {
    int error = link_error(&one->link);
    if (error) {
      lose_socket(one, strerror(error));
      return;
    }
    char request[256];
    int length = snprintf(request, sizeof request,
                          "GET /socket.io/?EIO=4&transport=websocket HTTP/1.1\r\nHost: 127.0.0.1:%u\r\n"
                          "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
                          "Sec-WebSocket-Key: d2F5YmlsbC1iZW5jaC0wMQ==\r\n\r\n",
                          one->port);
    one->state = UPGRADING;
    watch_link(&one->link, EPOLL_CTL_MOD, EPOLLIN);
    send_bytes(&one->link, request, (size_t)length);
    return;
  }
  if (events & EPOLLOUT && one->link.unwritten_length) flush_link(&one->link);
  if (events & ~(uint32_t)EPOLLOUT) read_socket(one);
}

// Walks up and down a street, about a metre a step: the server refuses jumps.
static void push_position(Socket *one) {
  Order *order = &orders[one->order];
  if (one->state != READY || one->link.unwritten_length) {
    counts.blocked++;
    return;
  }
  unsigned step = order->steps++ % 2000, place = step < 1000 ? step : 2000 - step;
  uint64_t ts = wall();
  char text[256];
  int length = snprintf(text, sizeof text,
                        "42[\"updateLocation\",{\"orderId\":\"%s\",\"lat\":%.5f,\"lng\":77.59460,\"ts\":%llu.%03llu,"
                        "\"accuracy\":5}]",
                        order->id, 12.97 + place * 1e-5, (unsigned long long)(ts / 1000000),
                        (unsigned long long)(ts / 1000 % 1000));
  send_text(one, text, (size_t)length);
  counts.pushed++;
  counts.due += order->watchers;
}

// POSTs

static const char *next_status(const Order *order) {
  static const char *const first[MOVES_FIRST] = {"confirmed", "preparing", "ready", "out_for_delivery"};
  if (order->moves < MOVES_FIRST) return first[order->moves];
  return order->moves % 2 ? "out_for_delivery" : "delivery_failed";
}

static void send_request(Poster *poster, const char *path, const char *headers, const char *body) {
  char request[16 * 1024];
  int length = snprintf(request, sizeof request,
                        "POST %s HTTP/1.1\r\nHost: 127.0.0.1:%u\r\n%s"
                        "Content-Type: application/json\r\nContent-Length: %zu\r\n\r\n%s",
                        path, post_port, headers, strlen(body), body);
  if (length >= (int)sizeof request) stop("a request is too long");
  poster->busy = true;
  counts.posted++;
  send_bytes(&poster->link, request, (size_t)length);
}

static Poster *free_poster(void) {
  for (unsigned i = 0; i < posters_count; i++)
    if (posters[i].connected && !posters[i].busy) return &posters[i];
  return NULL;
}

static bool move_one(uint64_t due) {
  Poster *poster = free_poster();
  if (poster == NULL) return false;
  for (unsigned i = 0; i < orders_count; i++) {
    unsigned number = (move_next + i) % orders_count;
    Order *order = &orders[number];
    if (order->moving) continue;  // its next status is legal only after the last one
    char path[128], body[128];
    snprintf(path, sizeof path, "/api/v1/orders/%s/status", order->id);
    snprintf(body, sizeof body, "{\"status\":\"%s\",\"note\":\"%llu\"}", next_status(order), (unsigned long long)due);
    order->moving = true;
    poster->order = number, poster->due = due;
    move_next = (number + 1) % orders_count;
    send_request(poster, path, service_header, body);
    return true;
  }
  return false;
}

static void place_one(Poster *poster) {
  poster->due = now();
  send_request(poster, "/api/v1/orders", service_header, place_body);
}

static bool deliver_one(Poster *poster, uint64_t due) {
  if (poster == NULL || webhook_next == webhooks_count) return false;
  const Webhook *webhook = &webhooks[webhook_next++];
  char headers[256];
  snprintf(headers, sizeof headers, "X-Razorpay-Signature: %s\r\nX-Razorpay-Event-Id: %s\r\n", webhook->signature,
           webhook->event_id);
  if (webhook->order >= 0) orders[webhook->order].delivered_at = due;
  poster->due = due;
  send_request(poster, "/api/v1/webhooks/razorpay", headers, webhook->body);
  return true;
}

// What a connection POSTs unasked, as soon as it can.
static void post_again(Poster *poster) {
  if (posts == PLACES) place_one(poster);
  else if (posts == WEBHOOKS && !post_interval) deliver_one(poster, now());
}

// The order's next turn: the same move again, unless this one was made.
static void end_move(Order *order, bool made) {
  order->moving = false;
  order->unsure = !made;
  if (made) order->moves++;
}

static void lose_poster(Poster *poster, const char *why) {
  if (poster->busy) {
    counts.refused++;
    note_why("a POST was not answered: %s", why);
    if (posts == MOVES) end_move(&orders[poster->order], false);
  }
  poster->connected = poster->busy = false;
  close_link(&poster->link);
  if (posting) open_link(&poster->link, post_port);
}

static void read_poster(Poster *poster) {
  ssize_t length = receive(&poster->link);
  if (length < 0) {
    lose_poster(poster, "the connection ended");
    return;
  }
  if (length == 0) return;
  char *body = strstr(read_buffer, "\r\n\r\n");
  char *size = body ? strcasestr(read_buffer, "\r\nContent-Length:") : NULL;
  if (body && (size == NULL || size > body)) stop("an answer has no Content-Length");
  if (body == NULL || read_buffer + length < body + 4 + strtoul(size + 17, NULL, 10)) {
    keep_rest(&poster->link, read_buffer, (size_t)length);
    return;
  }
  keep_rest(&poster->link, NULL, 0);
  poster->busy = false;
  histogram_add(&answering, now() - poster->due);
  bool good = strncmp(read_buffer, "HTTP/1.1 2", 10) == 0;
  // After a move that was made without our knowledge its repeat is no legal one.
  bool made = posts == MOVES && orders[poster->order].unsure && strncmp(read_buffer, "HTTP/1.1 409", 12) == 0;
  if (good || made) {
    counts.answered++;
  } else {
    counts.refused++;
    note_why("a POST was answered %.12s %.160s", read_buffer, body + 4);
  }
  if (posts == MOVES) end_move(&orders[poster->order], good || made);
  if (posting) post_again(poster);
}

static void on_poster(Poster *poster, uint32_t events) {
  if (!poster->connected) {
    if (link_error(&poster->link)) {
      note_why("nobody takes POSTs on port %u", post_port);
      posting = false;
      close_link(&poster->link);
      return;
    }
    poster->connected = true;
    watch_link(&poster->link, EPOLL_CTL_MOD, EPOLLIN);
    post_again(poster);
    return;
  }
  if (events & EPOLLOUT && poster->link.unwritten_length) flush_link(&poster->link);
  if (events & ~(uint32_t)EPOLLOUT) read_poster(poster);
}

static void start_posting(unsigned port, unsigned connections) {
  for (unsigned i = 0; i < posters_count; i++) close_link(&posters[i].link);
  posters = grown(posters, connections * sizeof *posters);
  posters_count = connections;
  post_port = port;
  posting = true;
  for (unsigned i = 0; i < connections; i++) {
    posters[i] = (Poster){.link = {.kind = POSTER, .fd = -1}};
    open_link(&posters[i].link, port);
  }
}

// orders from outside

static unsigned posts_open(void) {
  unsigned open = 0;
  for (unsigned i = 0; i < posters_count; i++) open += posters[i].busy;
  return open;
}

static void print_state(void) {
  unsigned long long tops = 0;
  for (unsigned i = 0; i < sockets_count; i++) tops += sockets[i].last_seq;
  printf("{\"sockets\":%u,\"ready\":%llu,\"failed\":%llu,\"lost\":%llu,\"retries\":%llu,\"bad_answers\":%llu,"
         "\"not_understood\":%llu,\"pushed\":%llu,\"blocked\":%llu,\"due\":%llu,\"shown\":%llu,\"old_positions\":%llu,"
         "\"events\":%llu,\"tops\":%llu,\"posted\":%llu,\"answered\":%llu,\"refused\":%llu,\"posts_open\":%u,"
         "\"last_ready_at_s\":%.6f,\"cpu_s\":%.6f,\"why\":\"%s\",",
         sockets_count, counts.ready, counts.failed, counts.lost, counts.retries, counts.bad_answers,
         counts.not_understood, counts.pushed, counts.blocked, counts.due, counts.shown, counts.old_positions,
         counts.events, tops, counts.posted, counts.answered, counts.refused, posts_open(),
         (double)counts.last_ready_at / 1e9,
         (double)nanoseconds(CLOCK_PROCESS_CPUTIME_ID) / 1e9, counts.why);
  histogram_print("connecting", &connecting), putchar(',');
  histogram_print("rejoining", &rejoining), putchar(',');
  histogram_print("showing", &showing), putchar(',');
  histogram_print("telling", &telling), putchar(',');
  histogram_print("answering", &answering);
  puts("}");
}

static void write_heard(const char *name) {
  FILE *file = fopen(name, "w");
  if (file == NULL) stop("the file for what was heard cannot be written");
  for (unsigned i = 0; i < sockets_count; i++) {
    if (sockets[i].agent) continue;
    fputs(orders[sockets[i].order].id, file);
    for (size_t j = 0; j < sockets[i].events_count; j++) {
      const Event *event = &sockets[i].events[j];
      fprintf(file, " %u:%s:%s", event->seq, event->type, event->status);
    }
    fputc('\n', file);
  }
  fclose(file);
}

static char *file_text(const char *name) {
  FILE *file = fopen(name, "r");
  char *text = NULL;
  size_t room = 0;
  if (file == NULL || getdelim(&text, &room, 0, file) < 0) stop("the file with the body cannot be read");
  fclose(file);
  return text;
}

// Lines of the file:   ORDER SIGNATURE EVENT_ID BODY      ORDER as in a plan, or -1
static void read_webhooks(const char *name) {
  FILE *file = fopen(name, "r");
  char *line = NULL;
  size_t room = 0;
  if (file == NULL) stop("the webhooks cannot be read");
  webhooks_count = webhook_next = 0;
  while (getline(&line, &room, file) > 0) {
    Webhook read;
    if (sscanf(line, "%d %ms %ms %m[^\n]", &read.order, &read.signature, &read.event_id, &read.body) != 4 ||
        read.order >= (int)orders_count)
      stop("a line of the webhooks is not understood");
    webhooks = grown(webhooks, (webhooks_count + 1) * sizeof *webhooks);
    webhooks[webhooks_count++] = read;
  }
  free(line);
  fclose(file);
}

static void obey(const char *command) {
  char word[16] = "", text[512] = "";
  unsigned first = 0, second = 0;
  double rate = 0;
  sscanf(command, "%15s", word);
  if (!strcmp(word, "connect")) {
    sscanf(command, "%*s %u %15s", &in_flight_max, text);
    replay = !strcmp(text, "replay");
  } else if (!strcmp(word, "rejoin")) {
    sscanf(command, "%*s %u", &rejoin_port);
  } else if (!strcmp(word, "push")) {
    unsigned agents = 0;
    for (unsigned i = 0; i < sockets_count; i++) agents += sockets[i].agent;
    sscanf(command, "%*s %lf", &rate);
    push_interval = rate > 0 && agents ? (uint64_t)((double)SECOND / rate / agents) : 0;
    push_due = now();
  } else if (!strcmp(word, "move")) {
    sscanf(command, "%*s %u %lf %u", &first, &rate, &second);
    posts = MOVES;
    post_interval = (uint64_t)((double)SECOND / rate);
    post_due = now();
    start_posting(first, second);
  } else if (!strcmp(word, "place")) {
    sscanf(command, "%*s %u %u %511s", &first, &second, text);
    posts = PLACES;
    place_body = file_text(text);
    post_interval = 0;
    start_posting(first, second);
  } else if (!strcmp(word, "deliver")) {
    sscanf(command, "%*s %u %lf %u %511s", &first, &rate, &second, text);
    posts = WEBHOOKS;
    read_webhooks(text);
    post_interval = rate > 0 ? (uint64_t)((double)SECOND / rate) : 0;
    post_due = now();
    start_posting(first, second);
  } else if (!strcmp(word, "rest")) {
    posting = false;
  } else if (!strcmp(word, "reset")) {
    counts.pushed = counts.blocked = counts.due = counts.shown = counts.old_positions = 0;
    counts.posted = posts_open(), counts.answered = 0;
    showing = telling = answering = (Histogram){0};
  } else if (!strcmp(word, "heard")) {
    sscanf(command, "%*s %511s", text);
    write_heard(text);
  } else if (strcmp(word, "state") != 0) {
    stop("unknown command");
  }
  print_state();
  fflush(stdout);
}

// Lines of PLAN:   service TOKEN · order ID · watcher ORDER PORT TOKEN · agent ORDER PORT TOKEN
// ORDER is the number of the order's line among those of orders, from 0 on.
static void read_plan(const char *name) {
  FILE *file = fopen(name, "r");
  char *line = NULL;
  size_t room = 0;
  if (file == NULL) stop("the plan cannot be read");
  while (getline(&line, &room, file) > 0) {
    char kind[16], *token = NULL;
    unsigned order, port;
    if (sscanf(line, "service %ms", &token) == 1) {
      if (asprintf(&service_header, "Authorization: Bearer %s\r\n", token) < 0) stop("out of memory");
      continue;
    }
    if (!strncmp(line, "order ", 6)) {
      orders = grown(orders, (orders_count + 1) * sizeof *orders);
      orders[orders_count] = (Order){0};
      sscanf(line, "order %63s", orders[orders_count++].id);
    } else if (sscanf(line, "%15s %u %u %ms", kind, &order, &port, &token) == 4 && order < orders_count) {
      sockets = grown(sockets, (sockets_count + 1) * sizeof *sockets);
      bool agent = !strcmp(kind, "agent");
      sockets[sockets_count++] =
          (Socket){.link = {.kind = SOCKET, .fd = -1}, .agent = agent, .port = port, .order = order, .token = token};
      if (!agent) orders[order].watchers++;
    } else {
      stop("a line of the plan is not understood");
    }
  }
  free(line);
  fclose(file);
}

// Everything that is due by the clock.
static void tick(void) {
  while (started_count < sockets_count && started_count - settled_count < in_flight_max) {
    start_socket(&sockets[started_count], sockets[started_count].port);
    started_count++;
  }
  uint64_t time = now();
  if (rejoin_port)
    for (unsigned i = 0; i < started_count; i++)
      if (sockets[i].state == IDLE && sockets[i].retry_at <= time) start_socket(&sockets[i], rejoin_port);
  for (; push_interval && push_due <= time; push_due += push_interval) {  // evenly spread: one agent after the other
    while (!sockets[push_next].agent) push_next = (push_next + 1) % sockets_count;
    push_position(&sockets[push_next]);
    push_next = (push_next + 1) % sockets_count;
  }
  // A POST that finds no connection free stays due, and its wait counts.
  for (; posting && post_interval && post_due <= time; post_due += post_interval)
    if (!(posts == MOVES ? move_one(post_due) : deliver_one(free_poster(), post_due))) break;
}

int main(int count, char **arguments) {
  if (count != 2) stop("usage: load PLAN");
  read_plan(arguments[1]);
  epoll = epoll_create1(EPOLL_CLOEXEC);
  fcntl(STDIN_FILENO, F_SETFL, fcntl(STDIN_FILENO, F_GETFL) | O_NONBLOCK);
  struct epoll_event input = {.events = EPOLLIN, .data.ptr = NULL};
  epoll_ctl(epoll, EPOLL_CTL_ADD, STDIN_FILENO, &input);
  static struct epoll_event events[EVENTS_AT_ONCE];
  char command[1024];
  size_t length = 0;
  for (;;) {
    tick();
    bool clocked = push_interval || (posting && post_interval) || rejoin_port;
    int ready = epoll_wait(epoll, events, EVENTS_AT_ONCE, clocked ? 1 : REST_MS);
    bool asked = false;
    for (int i = 0; i < ready; i++) {
      Link *link = events[i].data.ptr;
      if (link == NULL) asked = true;
      else if (link->kind == SOCKET) on_socket((Socket *)link, events[i].events);
      else on_poster((Poster *)link, events[i].events);
    }
    if (!asked) continue;
    ssize_t more = read(STDIN_FILENO, command + length, sizeof command - 1 - length);
    if (more == 0) return 0;  // whoever started us is gone
    if (more > 0) length += (size_t)more;
    command[length] = 0;
    for (char *end; (end = strchr(command, '\n')) != NULL;) {
      *end = 0;
      obey(command);
      length -= (size_t)(end + 1 - command);
      memmove(command, end + 1, length + 1);
    }
  }
}
