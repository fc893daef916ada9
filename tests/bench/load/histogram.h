// Counts durations in buckets that are 3 % wide, so that a million of them cost a few kilobytes.
#pragma once
#include <stdint.h>
#include <stdio.h>
#include <time.h>

enum { STEPS = 32, BUCKETS = 64 * STEPS };

typedef struct {
  uint64_t count, max, buckets[BUCKETS];
} Histogram;

static inline uint64_t nanoseconds(clockid_t clock) {
  struct timespec now;
  clock_gettime(clock, &now);
  return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static inline void histogram_add(Histogram *histogram, uint64_t value) {
  unsigned bucket = (unsigned)value;
  if (value >= STEPS) {
    unsigned shift = 58 - (unsigned)__builtin_clzll(value);  // leaves six bits: the leading one and five more
    bucket = shift * STEPS + (unsigned)(value >> shift);
  }
  histogram->buckets[bucket]++;
  histogram->count++;
  if (value > histogram->max) histogram->max = value;
}

// The upper end of the bucket in which this share of the durations has been passed.
static inline uint64_t histogram_at(const Histogram *histogram, double share) {
  uint64_t passed = 0, wanted = (uint64_t)(share * (double)histogram->count);
  for (unsigned bucket = 0; bucket < BUCKETS; bucket++) {
    passed += histogram->buckets[bucket];
    if (passed > wanted) {
      unsigned shift = bucket < 2 * STEPS ? 0 : bucket / STEPS - 1;
      uint64_t upper = ((uint64_t)(bucket - shift * STEPS) + 1) << shift;
      return upper < histogram->max ? upper : histogram->max;
    }
  }
  return histogram->max;
}

static inline void histogram_print(const char *name, const Histogram *histogram) {
  printf("\"%s\":{\"count\":%llu,\"p50_ms\":%.3f,\"p99_ms\":%.3f,\"p999_ms\":%.3f,\"max_ms\":%.3f}", name,
         (unsigned long long)histogram->count, (double)histogram_at(histogram, .5) / 1e6,
         (double)histogram_at(histogram, .99) / 1e6, (double)histogram_at(histogram, .999) / 1e6,
         (double)histogram->max / 1e6);
}
