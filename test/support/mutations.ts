/** Changes to valid files, as fast-check makes and shrinks them: of bytes, of JSON, of lists of tensors. */
import fc from 'fast-check';

/** Integers at which readers go wrong: signs, widths of integers, what a double holds exactly. */
const INTEGERS = [
  0n,
  1n,
  2n,
  3n,
  4n,
  0x7fn,
  0x80n,
  0xffn,
  0xffffn,
  0x10000n,
  100_000n,
  2n ** 31n - 1n,
  2n ** 31n,
  2n ** 32n - 1n,
  2n ** 32n,
  2n ** 53n - 1n,
  2n ** 53n,
  2n ** 63n - 1n,
  2n ** 63n,
  2n ** 64n - 1n,
] as const;

/** A place in a file as a share of its length, so that a change fits a file of any length. */
const place = fc.noBias(fc.nat({ max: 2 ** 24 - 1 })).map((steps) => steps / 2 ** 24);
const length = fc.oneof({ weight: 3, arbitrary: fc.integer({ min: 1, max: 16 }) }, fc.integer({ min: 1, max: 3000 }));
const integer = fc.oneof(fc.constantFrom(...INTEGERS), fc.bigInt({ min: 0n, max: 2n ** 64n - 1n }));

/** An integer of a file's format. */
export interface Field {
  readonly offset: number;
  readonly bytes: 1 | 2 | 4 | 8;
  readonly bigEndian?: boolean;
}

const byteChange = fc.oneof(
  fc.record({ kind: fc.constant('flip'), at: place, mask: fc.integer({ min: 1, max: 255 }) }),
  fc.record({ kind: fc.constant('write'), at: place, values: fc.uint8Array({ minLength: 1, maxLength: 12 }) }),
  fc.record({ kind: fc.constant('insert'), at: place, values: fc.uint8Array({ minLength: 1, maxLength: 300 }) }),
  fc.record({ kind: fc.constant('remove'), at: place, length }),
  fc.record({ kind: fc.constant('repeat'), at: place, length, to: place }),
  fc.record({ kind: fc.constant('swap'), at: place, length, to: place }),
  fc.record({ kind: fc.constant('truncate'), at: place }),
  fc.record({ kind: fc.constant('extend'), length, value: fc.constantFrom(0, 32, 255) }),
  fc.record({ kind: fc.constant('splice'), other: fc.nat(), at: place, to: place }),
  fc.record({ kind: fc.constant('field'), which: place, value: integer }),
  fc.record({ kind: fc.constant('near field'), which: place, difference: fc.constantFrom(-8, -1, 1, 2, 8) }),
  fc.record({
    kind: fc.constant('integer'),
    at: place,
    bytes: fc.constantFrom(1, 2, 4, 8),
    value: integer,
    bigEndian: fc.boolean(),
  }),
);
export type ByteChange = typeof byteChange extends fc.Arbitrary<infer Change> ? Change : never;

/** Some changes of bytes, one after the other. */
export const byteChanges: fc.Arbitrary<ByteChange[]> = few(byteChange);

/** Mostly one: a file with many faults is refused for the first. */
export function few<Change>(change: fc.Arbitrary<Change>): fc.Arbitrary<Change[]> {
  return fc.oneof(
    { weight: 3, arbitrary: fc.array(change, { maxLength: 1 }) },
    { weight: 2, arbitrary: fc.array(change, { maxLength: 5 }) },
  );
}

/**
 * @param fields integers at known places, before any change
 * @param others files whose ends may be put on this one's start
 */
export function changedBytes(
  file: Uint8Array,
  changes: readonly ByteChange[],
  { fields = [], others = [] }: { readonly fields?: readonly Field[]; readonly others?: readonly Uint8Array[] } = {},
): Uint8Array {
  return changes.reduce<Uint8Array>(
    (bytes, change) => changeBytes(bytes, change, fields, others),
    Uint8Array.from(file),
  );
}

function changeBytes(
  bytes: Uint8Array,
  change: ByteChange,
  fields: readonly Field[],
  others: readonly Uint8Array[],
): Uint8Array {
  const offset = (share: number, all = bytes) => Math.floor(share * all.length);
  const joined = (...parts: Uint8Array[]) => Uint8Array.from(Buffer.concat(parts));
  switch (change.kind) {
    case 'flip':
      if (bytes.length) bytes[offset(change.at)]! ^= change.mask;
      return bytes;
    case 'write': {
      const at = offset(change.at);
      bytes.set(change.values.subarray(0, bytes.length - at), at);
      return bytes;
    }
    case 'insert':
      return joined(bytes.subarray(0, offset(change.at)), change.values, bytes.subarray(offset(change.at)));
    case 'remove':
      return joined(bytes.subarray(0, offset(change.at)), bytes.subarray(offset(change.at) + change.length));
    case 'repeat': {
      const [at, to] = [offset(change.at), offset(change.to)];
      return joined(bytes.subarray(0, to), bytes.subarray(at, at + change.length), bytes.subarray(to));
    }
    case 'swap': {
      const [first, second] = [offset(change.at), offset(change.to)].sort((a, b) => a - b) as [number, number];
      const size = Math.min(change.length, second - first, bytes.length - second);
      const [a, b] = [bytes.slice(first, first + size), bytes.slice(second, second + size)];
      bytes.set(b, first);
      bytes.set(a, second);
      return bytes;
    }
    case 'truncate':
      return bytes.slice(0, offset(change.at));
    case 'extend':
      return joined(bytes, new Uint8Array(change.length).fill(change.value));
    case 'splice': {
      const other = others[change.other % others.length] ?? bytes;
      return joined(bytes.subarray(0, offset(change.at)), other.subarray(offset(change.to, other)));
    }
    case 'field': {
      const field = fields[Math.floor(change.which * fields.length)];
      return field ? withInteger(bytes, field, () => change.value) : bytes;
    }
    case 'near field': {
      const field = fields[Math.floor(change.which * fields.length)];
      return field ? withInteger(bytes, field, (value) => value + BigInt(change.difference)) : bytes;
    }
    case 'integer': {
      const field = { offset: offset(change.at), bytes: change.bytes as Field['bytes'], bigEndian: change.bigEndian };
      return withInteger(bytes, field, () => change.value);
    }
  }
}

function withInteger(bytes: Uint8Array, field: Field, change: (value: bigint) => bigint): Uint8Array {
  const { offset, bytes: size, bigEndian = false } = field;
  if (offset + size > bytes.length) return bytes;
  const places = Array.from({ length: size }, (_, i) => offset + (bigEndian ? size - 1 - i : i));
  const value = places.reduce((sum, at, i) => sum | (BigInt(bytes[at]!) << BigInt(8 * i)), 0n);
  const changed = BigInt.asUintN(8 * size, change(value));
  for (const [i, at] of places.entries()) bytes[at] = Number((changed >> BigInt(8 * i)) & 0xffn);
  return bytes;
}

/** JSON that may have what `JSON.stringify` cannot write: members of one name, numbers of any form. */
type Json =
  | { readonly kind: 'text'; readonly text: string }
  | { readonly kind: 'array'; readonly items: Json[] }
  | { readonly kind: 'object'; readonly members: [key: string, value: Json][] };

/** Texts too long to be shown with a case that fails, by what it shows in their place. */
const long = new Map([
  ['a long text', JSON.stringify('long'.repeat(2500))],
  ['a long list', `[${'0,'.repeat(3000)}0]`],
  ['a deep list', '['.repeat(3000) + ']'.repeat(3000)],
  ['a deep object', `${'{"a":'.repeat(3000)}0${'}'.repeat(3000)}`],
]);
const LONG_NAME = 'a long name';

function longName(text: string): string {
  return text.replace(LONG_NAME, () => 'long'.repeat(2500));
}

/** Values as they stand in a file. */
const values = [
  ...['null', 'true', 'false', '-0', '0', '1', '-1', '0.5', '1e999', '-1e999', '1e-999', '1E400', '123456789e3'],
  ...INTEGERS.map(String),
  ...['""', '" "', '"a"', '"0"', '"__proto__"', '"constructor"', '"\\u0000"', '"\\ud800"', '"\\n\\u001b[2J\\u202e"'],
  ...['[]', '{}', '[[]]', '[null]', '[0]', '[{}]', '{"length":4294967295}', '{"__proto__":{"a":1}}', '{"a":{"a":[]}}'],
  ...long.keys(),
];
const keys = [
  '__proto__',
  'constructor',
  'toString',
  'length',
  '',
  '__metadata__',
  '0',
  '-1',
  '\n\u001b[2J\u202e',
  LONG_NAME,
];

/** The first ones often: what stands at the start of a file decides how the rest is read. */
const number = fc.oneof(fc.nat({ max: 20 }), fc.nat());

const jsonChange = fc.record({
  /** Which value, and which other. */
  at: number,
  other: number,
  kind: fc.constantFrom('value', 'value', 'value', 'copy', 'delete', 'duplicate', 'key', 'other key', 'wrap', 'join'),
  value: fc.oneof({ weight: 4, arbitrary: fc.constantFrom(...values) }, fc.json({ maxDepth: 2 })),
  key: fc.oneof({ weight: 4, arbitrary: fc.constantFrom(...keys) }, fc.string()),
});
export type JsonChange = typeof jsonChange extends fc.Arbitrary<infer Change> ? Change : never;

/** Some changes of JSON, one after the other. */
export const jsonChanges: fc.Arbitrary<JsonChange[]> = few(jsonChange);

/** Changes values of a JSON text, those included that lie in texts in it. Text that is no JSON stays. */
export function changedJson(text: string, changes: readonly JsonChange[]): string {
  if (changes.length === 0) return text;
  let value: unknown;
  try {
    value = JSON.parse(text);
  } catch {
    return text;
  }
  const root: Json = { kind: 'array', items: [fromValue(value)] };
  for (const change of changes) changeJson(root, change);
  return root.items.map(jsonText).join('');
}

/** What lies deeper is not changed by itself. */
const MAX_DEPTH = 50;

function fromValue(value: unknown, depth = 0): Json {
  if (depth < MAX_DEPTH && Array.isArray(value)) {
    return { kind: 'array', items: value.map((item) => fromValue(item, depth + 1)) };
  }
  if (depth < MAX_DEPTH && typeof value === 'object' && value !== null) {
    return {
      kind: 'object',
      members: Object.entries(value).map(([key, member]) => [key, fromValue(member, depth + 1)]),
    };
  }
  return { kind: 'text', text: JSON.stringify(value) };
}

function jsonText(json: Json): string {
  if (json.kind === 'text') return json.text;
  if (json.kind === 'array') return `[${json.items.map(jsonText).join(',')}]`;
  return `{${json.members.map(([key, value]) => `${JSON.stringify(key)}:${jsonText(value)}`).join(',')}}`;
}

/** Where a value lies: the array or object that holds it, and its number there. */
interface Place {
  readonly parent: Exclude<Json, { kind: 'text' }>;
  readonly index: number;
}

function placesOf(parent: Exclude<Json, { kind: 'text' }>): Place[] {
  const held = parent.kind === 'array' ? parent.items : parent.members.map(([, value]) => value);
  return held.flatMap((value, index) => [{ parent, index }, ...(value.kind === 'text' ? [] : placesOf(value))]);
}

function changeJson(root: Exclude<Json, { kind: 'text' }>, change: JsonChange): void {
  const places = placesOf(root);
  const [at, other] = [change.at, change.other].map((number) => places[number % places.length]);
  if (!at || !other) return;
  const { parent, index } = at;
  const held = valueAt(at);
  // JSON in a text: metadata of weights.
  if (held.kind === 'text' && /^"\s*[{[]/.test(held.text) && change.kind !== 'delete') {
    const inner = changedJson(JSON.parse(held.text) as string, [{ ...change, at: change.other, other: change.at }]);
    put(at, { kind: 'text', text: JSON.stringify(inner) });
    return;
  }
  const list: unknown[] = parent.kind === 'array' ? parent.items : parent.members;
  switch (change.kind) {
    case 'value':
      put(at, newValue(change));
      break;
    case 'copy':
      // As text, so that a value can hold a copy of what it lies in.
      put(at, { kind: 'text', text: jsonText(valueAt(other)) });
      break;
    case 'delete':
      list.splice(index, 1);
      break;
    case 'duplicate':
      list.splice(index, 0, structuredClone(list[index]));
      break;
    case 'key':
      if (parent.kind === 'object') parent.members[index]![0] = longName(change.key);
      break;
    case 'other key':
      if (parent.kind === 'object' && other.parent.kind === 'object') {
        parent.members[index]![0] = other.parent.members[other.index]![0];
      }
      break;
    case 'wrap':
      put(at, { kind: 'array', items: [held] });
      break;
    case 'join':
      if (held.kind === 'array') held.items.push(newValue(change));
      if (held.kind === 'object') held.members.push([longName(change.key), newValue(change)]);
      break;
  }
}

function newValue({ value }: JsonChange): Json {
  return { kind: 'text', text: long.get(value) ?? value };
}

function valueAt({ parent, index }: Place): Json {
  return parent.kind === 'array' ? parent.items[index]! : parent.members[index]![1];
}

function put({ parent, index }: Place, value: Json): void {
  if (parent.kind === 'array') parent.items[index] = value;
  else parent.members[index]![1] = value;
}

/** A safetensors file taken apart. */
export interface TensorList {
  readonly metadata: Readonly<Record<string, string>>;
  readonly tensors: readonly ListedTensor[];
}

export interface ListedTensor {
  readonly name: string;
  /** As in the file, such as `F32`. */
  readonly dtype: string;
  readonly shape: readonly number[];
  readonly data: Uint8Array;
}

const elementBytes: Readonly<Record<string, number>> = {
  ...{ F64: 8, F32: 4, F16: 2, BF16: 2, F8_E4M3: 1, F8_E5M2: 1 },
  ...{ I64: 8, I32: 4, I16: 2, I8: 1, U8: 1, BOOL: 1 },
};

/** What tensors of this size and larger hold is left as it is. */
const MAX_DATA = 2 ** 16;

/** Takes a valid file apart. */
export function listTensors(file: Uint8Array): TensorList {
  const dataStart = 8 + Number(new DataView(file.buffer, file.byteOffset).getBigUint64(0, true));
  const header = JSON.parse(new TextDecoder().decode(file.subarray(8, dataStart)));
  const { __metadata__: metadata = {}, ...entries } = header;
  type Entry = { dtype: string; shape: number[]; data_offsets: [number, number] };
  return {
    metadata,
    tensors: Object.entries<Entry>(entries).map(
      ([
        name,
        {
          dtype,
          shape,
          data_offsets: [start, end],
        },
      ]) => ({
        name,
        dtype,
        shape,
        data: file.slice(dataStart + start, dataStart + end),
      }),
    ),
  };
}

/** The file of a list, with changes of its header's JSON. */
export function safetensorsFile({ metadata, tensors }: TensorList, changes: readonly JsonChange[] = []): Uint8Array {
  let end = 0;
  const entries = tensors.map(({ name, dtype, shape, data }) => {
    const start = end;
    end += data.length;
    return [name, { dtype, shape, data_offsets: [start, end] }] as const;
  });
  const json = JSON.stringify(Object.fromEntries<unknown>([['__metadata__', metadata], ...entries]));
  const header = Buffer.from(changedJson(json, changes));
  const size = Buffer.alloc(8);
  size.writeBigUInt64LE(BigInt(header.length));
  return Uint8Array.from(Buffer.concat([size, header, ...tensors.map(({ data }) => data)]));
}

const nameParts = [
  ...[
    'weight',
    'bias',
    '0',
    '1',
    '255',
    '256',
    '99999999999999999999',
    '-1',
    '1e3',
    '',
    '__proto__',
    '\n\u001b[2J',
    LONG_NAME,
  ],
  ...['scale_weight', 'weight_scale', 'scale_input', 'comfy_quant', 'weight.int8_scale', 'weight.int4_scale', 'absmax'],
  ...[
    'lora_A',
    'lora_down',
    'lora_up',
    'alpha',
    'lora_mid',
    'dora_scale',
    'hada_w1_a',
    'lora_unet_x',
    'clip_l',
    'clip_g',
  ],
];

const tensorChange = fc.record({
  kind: fc.constantFrom(
    ...(['part', 'add part', 'remove part', 'name', 'size', 'add size', 'remove size', 'swap sizes', 'dtype'] as const),
    ...(['values', 'drop', 'copy', 'companion', 'foreign', 'metadata', 'entry', 'entry', 'entry'] as const),
  ),
  at: number,
  other: number,
  part: fc.nat({ max: 8 }),
  text: fc.oneof({ weight: 4, arbitrary: fc.constantFrom(...nameParts) }, fc.string()),
  size: fc.oneof(fc.nat({ max: 300 }), fc.constantFrom(...INTEGERS.filter((value) => value < 2n ** 53n).map(Number))),
  dtype: fc.constantFrom(...Object.keys(elementBytes)),
  value: fc.constantFrom(0, 0x3c, 0x7c, 0x7f, 0x80, 0xff),
  json: jsonChange,
});
export type TensorChange = typeof tensorChange extends fc.Arbitrary<infer Change> ? Change : never;

/** Some changes of tensors, one after the other. Offsets and lengths stay true, so that more than the header is tried. */
export const tensorChanges: fc.Arbitrary<TensorChange[]> = few(tensorChange);

/** @param others whose tensors may be added */
export function changedTensors(
  list: TensorList,
  changes: readonly TensorChange[],
  others: readonly TensorList[] = [],
): TensorList {
  return changes.reduce((changed, change) => changeTensors(changed, change, others), list);
}

function changeTensors(list: TensorList, change: TensorChange, others: readonly TensorList[]): TensorList {
  const { tensors, metadata } = list;
  const text = longName(change.text);
  const index = change.at % tensors.length;
  const tensor = tensors[index];
  if (!tensor) return list;
  const other = tensors[change.other % tensors.length]!;
  const replaced = (by: Partial<ListedTensor>) => ({
    metadata,
    tensors: tensors.with(index, sized({ ...tensor, ...by })),
  });
  const parts = tensor.name.split('.');
  const part = change.part % parts.length;
  const { shape } = tensor;
  const axis = change.part % Math.max(shape.length, 1);
  switch (change.kind) {
    case 'part':
      return replaced({ name: parts.with(part, text).join('.') });
    case 'add part':
      return replaced({ name: parts.toSpliced(part, 0, text).join('.') });
    case 'remove part':
      return replaced({ name: parts.toSpliced(part, 1).join('.') });
    case 'name':
      return replaced({ name: other.name });
    case 'size':
      return shape.length ? replaced({ shape: shape.with(axis, change.size) }) : list;
    case 'add size':
      return replaced({ shape: shape.toSpliced(axis, 0, change.size) });
    case 'remove size':
      return replaced({ shape: shape.toSpliced(axis, 1) });
    case 'swap sizes':
      return replaced({ shape: shape.toReversed() });
    case 'dtype':
      return replaced({ dtype: change.dtype });
    case 'values':
      return replaced({ data: tensor.data.slice().fill(change.value) });
    case 'drop':
      return { metadata, tensors: tensors.toSpliced(index, 1) };
    case 'copy':
      return { metadata, tensors: [...tensors, { ...other, name: parts.with(part, text).join('.') }] };
    case 'companion': {
      const { dtype, size } = change;
      const own = { name: `${tensor.name}.${text}`, dtype, shape: size % 2 ? [] : [size], data: new Uint8Array(0) };
      const beside = { ...own, name: parts.with(-1, text).join('.') };
      return { metadata, tensors: [...tensors, sized(change.other % 2 ? own : beside)] };
    }
    case 'foreign': {
      const from = others[change.other % others.length];
      return { metadata, tensors: [...tensors, ...(from?.tensors.slice(0, change.size) ?? [])] };
    }
    case 'metadata':
      return { tensors, metadata: { ...metadata, ...others[change.other % others.length]?.metadata, [text]: '1' } };
    case 'entry': {
      const entries = Object.entries(metadata);
      const [key, value] = entries[change.other % entries.length] ?? [text, '{}'];
      return { tensors, metadata: { ...metadata, [key]: changedJson(value, [change.json]) } };
    }
  }
}

/** With as many bytes as its shape needs; of a shape that needs too many, those it had. */
function sized(tensor: ListedTensor): ListedTensor {
  const bytes = tensor.shape.reduce((product, size) => product * size, elementBytes[tensor.dtype] ?? 1);
  if (bytes === tensor.data.length || !(bytes <= MAX_DATA)) return tensor;
  const data = new Uint8Array(bytes);
  for (let at = 0; at < bytes && tensor.data.length > 0; at += tensor.data.length) {
    data.set(tensor.data.subarray(0, bytes - at), at);
  }
  return { ...tensor, data };
}
