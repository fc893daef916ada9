// Reads JSON where it lies: no tree, no copies.
#pragma once
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

// A piece of text; `at` is NULL when there is none.
typedef struct {
  const char *at, *end;
} Slice;

// The value of a member of an object.
Slice json_member(Slice object, const char *name);

// Takes the next element of an array off `rest`, which is the whole array at first. False at its end.
bool json_next(Slice *rest, Slice *element);

// Whether a value is this string, or this literal such as `true`.
bool json_is_string(Slice value, const char *wanted);
bool json_is_literal(Slice value, const char *wanted);

// A number, or `otherwise` when it is none.
double json_number(Slice value, double otherwise);

// Copies a string without its quotes, cut to `size`; empty when it is no string.
void json_copy(Slice value, char *into, size_t size);
