// How long a server leaves a small request unanswered: asks GET /health/live over one kept connection, every 2 ms.
//
// usage: probe PORT     Each line on standard input is answered with the durations since the one before, as JSON.
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "histogram.h"

enum { PAUSE_MS = 2 };

static void stop(const char *why) {
  fprintf(stderr, "probe: %s\n", why);
  exit(2);
}

int main(int count, char **arguments) {
  if (count != 2) stop("usage: probe PORT");
  int server = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), on = 1;
  struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)atoi(arguments[1]))};
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  if (connect(server, (struct sockaddr *)&address, sizeof address) < 0) stop("nobody answers on this port");
  setsockopt(server, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
  static Histogram waiting;
  struct pollfd input = {.fd = STDIN_FILENO, .events = POLLIN};
  for (;;) {
    static const char request[] = "GET /health/live HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n";
    char answer[4096];
    uint64_t asked = nanoseconds(CLOCK_MONOTONIC);
    if (write(server, request, sizeof request - 1) != sizeof request - 1) stop("the server does not read");
    // The answer is a few hundred bytes and leaves in one write.
    ssize_t length = read(server, answer, sizeof answer);
    if (length < 12 || strncmp(answer, "HTTP/1.1 200", 12) != 0) stop("the server does not answer 200");
    histogram_add(&waiting, nanoseconds(CLOCK_MONOTONIC) - asked);
    if (poll(&input, 1, PAUSE_MS) > 0) {
      if (read(STDIN_FILENO, answer, sizeof answer) <= 0) return 0;  // whoever started us is gone
      putchar('{');
      histogram_print("waiting", &waiting);
      puts("}");
      fflush(stdout);
      waiting = (Histogram){0};
    }
  }
}
