#include "json.h"

#include <stdlib.h>
#include <string.h>

static const char *skip_space(const char *at, const char *end) {
  while (at < end && (*at == ' ' || *at == '\n' || *at == '\t' || *at == '\r')) at++;
  return at;
}

static const char *skip_string(const char *at, const char *end) {
  for (at++; at < end; at++) {
    if (*at == '\\') at++;
    else if (*at == '"') return at + 1;
  }
  return NULL;
}

// The place behind the value that begins at `at`; NULL when the text ends within it.
static const char *skip_value(const char *at, const char *end) {
  int depth = 0;
  do {
    if (at >= end) return NULL;
    if (*at == '"') {
      if ((at = skip_string(at, end)) == NULL) return NULL;
    } else if (*at == '{' || *at == '[') {
      depth++, at++;
    } else if (*at == '}' || *at == ']') {
      depth--, at++;
    } else if (depth) {
      at++;
    } else {
      while (at < end && !strchr(",]} \n\t\r", *at)) at++;
    }
  } while (depth > 0);
  return at;
}

Slice json_member(Slice object, const char *name) {
  const Slice none = {NULL, NULL};
  if (object.at == NULL || object.at >= object.end || *object.at != '{') return none;
  size_t length = strlen(name);
  const char *at = object.at + 1, *end = object.end;
  while ((at = skip_space(at, end)) < end && *at == '"') {
    const char *key = at + 1;
    if ((at = skip_string(at, end)) == NULL) return none;
    bool found = (size_t)(at - 1 - key) == length && memcmp(key, name, length) == 0;
    at = skip_space(at, end);
    if (at >= end || *at != ':') return none;
    const char *value = skip_space(at + 1, end);
    if ((at = skip_value(value, end)) == NULL) return none;
    if (found) return (Slice){value, at};
    at = skip_space(at, end);
    if (at < end && *at == ',') at++;
  }
  return none;
}

bool json_next(Slice *rest, Slice *element) {
  if (rest->at == NULL) return false;
  const char *at = skip_space(rest->at, rest->end);
  if (at >= rest->end || (*at != '[' && *at != ',')) return false;
  at = skip_space(at + 1, rest->end);
  if (at >= rest->end || *at == ']') return false;
  const char *behind = skip_value(at, rest->end);
  if (behind == NULL) return false;
  *element = (Slice){at, behind};
  rest->at = behind;
  return true;
}

bool json_is_literal(Slice value, const char *wanted) {
  size_t length = strlen(wanted);
  return value.at != NULL && (size_t)(value.end - value.at) == length && memcmp(value.at, wanted, length) == 0;
}

bool json_is_string(Slice value, const char *wanted) {
  if (value.at == NULL || value.end - value.at < 2 || *value.at != '"') return false;
  return json_is_literal((Slice){value.at + 1, value.end - 1}, wanted);
}

double json_number(Slice value, double otherwise) {
  char digits[40];
  size_t length = value.at == NULL ? 0 : (size_t)(value.end - value.at);
  if (length == 0 || length >= sizeof digits) return otherwise;
  memcpy(digits, value.at, length);
  digits[length] = 0;
  char *end;
  double number = strtod(digits, &end);
  return *end ? otherwise : number;
}

void json_copy(Slice value, char *into, size_t size) {
  into[0] = 0;
  if (value.at == NULL || value.end - value.at < 2 || *value.at != '"') return;
  size_t length = (size_t)(value.end - value.at) - 2;
  if (length >= size) length = size - 1;
  memcpy(into, value.at + 1, length);
  into[length] = 0;
}
