/**
 * JSON from outside, read with memory in proportion to it. Long lists have schemas of their own here, as zod notes each
 * wrong value at hundreds of bytes, so that a file of some megabytes would ask for gigabytes; these stop at the first.
 */
import { z } from 'zod';

/** Parsed, JSON can take twenty times its length. The longest that is read is a tokenizer of 4 MB. */
const MAX_LENGTH = 2 ** 24;

/** The value of a JSON text; `refuse` makes the error from a clause such as `is not JSON`. */
export function parseJson(text: string, refuse: (fault: string) => Error): unknown {
  if (text.length > MAX_LENGTH) throw refuse(`is longer than ${MAX_LENGTH} characters`);
  try {
    return JSON.parse(text);
  } catch {
    throw refuse('is not JSON');
  }
}

/** An object whose values all pass a check. */
export function recordOf<T>(is: (value: unknown) => value is T) {
  return z.custom<Record<string, T>>(
    (value) =>
      typeof value === 'object' && value !== null && !Array.isArray(value) && Object.values(value).every((v) => is(v)),
  );
}

/** A list whose items all pass a check. */
export function listOf<T>(is: (value: unknown) => value is T) {
  return z.custom<T[]>((value) => Array.isArray(value) && value.every((item) => is(item)));
}

/** A list of no more than `most` items, each of which is looked at in full. */
export function shortList<Schema extends z.ZodType>(item: Schema, most: number) {
  return z.array(z.unknown()).max(most).pipe(z.array(item));
}

export function isText(value: unknown): value is string {
  return typeof value === 'string';
}

/** A whole number from 0 to 2^53 - 1. */
export function isCount(value: unknown): value is number {
  return Number.isSafeInteger(value) && (value as number) >= 0;
}

/** A number; JSON has no infinite ones, but what is too large for a double becomes one. */
export function isFiniteNumber(value: unknown): value is number {
  return Number.isFinite(value);
}
