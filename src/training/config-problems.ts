/** What is wrong with a configuration, in words: the setting, what it is, what it should be. */

import { z } from 'zod';
import { quote } from '../weights/quote.ts';

type Issue = z.core.$ZodRawIssue;

/** The message of a setting with an odd format: what to give. For `error` in a schema. */
export function give(remedy: string): (issue: { readonly input?: unknown }) => string {
  return ({ input }) => told(input, remedy);
}

/** The message of any other problem; undefined where Zod's own says as much. For `error` in `safeParse`. */
export function problemMessage(issue: Issue): string | undefined {
  const { input } = issue;
  switch (issue.code) {
    case 'invalid_type':
      return told(input, expectation(issue.expected, issue.inst, input));
    case 'invalid_value':
      return told(input, oneOf(issue.values));
    case 'invalid_union':
      return issue.discriminator === undefined
        ? undefined
        : told(property(input, issue.discriminator), oneOf(Array.isArray(issue.options) ? issue.options : []));
    case 'too_small':
      return told(input, bound(issue.origin, issue.minimum, issue.inclusive ? 'at least' : 'more than'));
    case 'too_big':
      return told(input, bound(issue.origin, issue.maximum, issue.inclusive ? 'at most' : 'less than'));
    case 'unrecognized_keys':
      return unknownKeys(issue.keys, issue.inst);
    default:
      return undefined;
  }
}

/** Where a problem lies and what it is: `stages[0].steps is 0, give at least 1`. */
export function problemText({ path, message }: z.core.$ZodIssue): string {
  return `${placeOf(path) || 'it'} ${message}`;
}

function placeOf(path: readonly PropertyKey[]): string {
  return path.reduce<string>((place, key) => {
    if (typeof key === 'number') return `${place}[${key}]`;
    const name = String(key);
    if (!/^[\w-]+$/.test(name)) return `${place}[${quote(name)}]`;
    return place ? `${place}.${name}` : name;
  }, '');
}

function told(input: unknown, remedy: string): string {
  return `${shown(input)}, give ${remedy}`;
}

/** A value as it may stand in a message. */
function shown(value: unknown): string {
  if (value === undefined) return 'is missing';
  if (value === null || value === '') return 'is empty';
  if (typeof value === 'string') return `is ${quote(value)}`;
  if (Array.isArray(value)) return value.length > 0 ? 'is a list' : 'is an empty list';
  return typeof value === 'object' ? 'has settings' : `is ${String(value)}`;
}

/** What types are called, by Zod's names for them. */
const expectations: Readonly<Record<string, string>> = {
  string: 'a text',
  number: 'a number',
  int: 'a whole number',
  boolean: 'true or false',
  record: 'names, such as { NAME: ... }',
};

function expectation(expected: string, schema: unknown, input: unknown): string {
  // What was meant most likely stands there already, without what encloses it.
  const inside = typeof input === 'number' ? String(input) : typeof input === 'string' ? quote(input) : '...';
  if (expected === 'array' || expected === 'tuple') return `a list, such as [${inside}]`;
  if (expected !== 'object') return expectations[expected] ?? expected;
  const first = schema instanceof z.ZodDiscriminatedUnion ? schema.def.discriminator : knownKeys(schema)[0];
  return first === undefined ? 'settings' : `settings, such as { ${first}: ${inside} }`;
}

function oneOf(values: readonly unknown[]): string {
  return values.length === 1 ? String(values[0]) : `one of ${values.join(', ')}`;
}

function property(value: unknown, key: string): unknown {
  return typeof value === 'object' && value !== null ? Object.getOwnPropertyDescriptor(value, key)?.value : undefined;
}

function bound(origin: string, limit: number | bigint, which: string): string {
  const items = origin === 'array' || origin === 'tuple' || origin === 'set';
  return `${which} ${limit}${items ? (Number(limit) === 1 ? ' entry' : ' entries') : ''}`;
}

/** Keys named in one message. */
const TOLD_KEYS = 3;

function unknownKeys(keys: readonly string[], schema: unknown): string {
  const known = knownKeys(schema);
  const named = keys.slice(0, TOLD_KEYS).map((key) => {
    const similar = known.find((other) => isSimilar(key, other));
    return similar === undefined ? quote(key) : `${quote(key)} (did you mean ${similar}?)`;
  });
  const all = keys.length > TOLD_KEYS ? [...named, `${keys.length - TOLD_KEYS} more`] : named;
  const guessed = named.every((name) => name.endsWith('?)'));
  const others = guessed ? '' : `, give some of ${known.join(', ')}`;
  return `has ${all.join(', ')}, which is no setting there${others}`;
}

function knownKeys(schema: unknown): string[] {
  return schema instanceof z.ZodObject ? Object.keys(schema.shape).filter((key) => key !== '$schema') : [];
}

/** Whether two names differ by how they are joined, or by one letter left out, added, changed or swapped. */
function isSimilar(a: string, b: string): boolean {
  const [short, long] = [a, b].map(bareName).sort((one, other) => one.length - other.length) as [string, string];
  if (long.length - short.length > 1) return false;
  let same = 0;
  while (same < short.length && short[same] === long[same]) same++;
  const rest = (text: string, skipped: number) => text.slice(same + skipped);
  if (short.length < long.length) return rest(short, 0) === rest(long, 1);
  const swapped = short[same] === long[same + 1] && short[same + 1] === long[same];
  return rest(short, 1) === rest(long, 1) || (swapped && rest(short, 2) === rest(long, 2));
}

function bareName(name: string): string {
  return name.replace(/[-_]/g, '').toLowerCase();
}
