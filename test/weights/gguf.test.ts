import { readFileSync } from 'node:fs';
import { describe, expect, test } from 'vitest';
import { MmditxError } from '../../src/errors.ts';
import { type DType, toFloat32 } from '../../src/tensor/data.ts';
import { type GgufFile, openGguf } from '../../src/weights/gguf.ts';
import { blockFormats } from '../../src/weights/gguf-blocks.ts';
import { type ByteSource, openSafetensors, readExactly, readTensor, viewAs } from '../../src/weights/safetensors.ts';
import { bytesSource } from './sources.ts';

const fixture = (name: string) => new Uint8Array(readFileSync(new URL(`../fixtures/gguf/${name}`, import.meta.url)));

/** A header put together by hand; what it announces need not be true. */
class Header {
  readonly bytes: number[] = [];

  uint32(value: number): this {
    this.bytes.push(...new Uint8Array(Uint32Array.of(value).buffer));
    return this;
  }
  uint64(value: number | bigint): this {
    this.bytes.push(...new Uint8Array(BigUint64Array.of(BigInt(value)).buffer));
    return this;
  }
  text(value: string | number[]): this {
    const bytes = typeof value === 'string' ? new TextEncoder().encode(value) : value;
    this.uint64(bytes.length).bytes.push(...bytes);
    return this;
  }
  start(tensors: number | bigint, entries: number | bigint, version = 3): this {
    this.bytes.push(...new TextEncoder().encode('GGUF'));
    return this.uint32(version).uint64(tensors).uint64(entries);
  }
  /** A metadata entry whose value follows. */
  entry(key: string, type: number): this {
    return this.text(key).uint32(type);
  }
  tensor(name: string, dimensions: (number | bigint)[], type: number, offset: number | bigint): this {
    this.text(name).uint32(dimensions.length);
    for (const dimension of dimensions) this.uint64(dimension);
    return this.uint32(type).uint64(offset);
  }
  /** The file, with `length` bytes of data. */
  file(length = 0, alignment = 32): Uint8Array {
    const bytes = new Uint8Array(Math.ceil(this.bytes.length / alignment) * alignment + length);
    bytes.set(this.bytes);
    return bytes;
  }
}
const header = () => new Header();
const [UINT8, UINT32, INT32, FLOAT32, STRING, ARRAY] = [0, 4, 5, 6, 8, 9];
const [F32, Q8_0, IQ4_NL] = [0, 8, 20];

const open = (bytes: Uint8Array) => openGguf(bytesSource(bytes, 'model.gguf'));

async function refusal(source: ByteSource | Uint8Array): Promise<MmditxError> {
  const error = await openGguf(source instanceof Uint8Array ? bytesSource(source, 'model.gguf') : source).then(
    () => undefined,
    (caught) => caught,
  );
  expect(error).toBeInstanceOf(MmditxError);
  // One sentence that names the file.
  expect(error.message).toMatch(/^[^\n]*model\.gguf[^\n]*\.$/);
  return error;
}

describe('a file of the reference writer', async () => {
  const file = await open(fixture('types.gguf'));

  test('metadata of every type', () => {
    expect(Object.fromEntries(file.metadata)).toMatchObject({
      'general.architecture': 'sd3',
      'test.u8': 255,
      'test.i8': -128,
      'test.u16': 65535,
      'test.i16': -32768,
      'test.u32': 4294967295,
      'test.i32': -2147483648,
      'test.f32': 0.15625,
      'test.yes': true,
      'test.no': false,
      'test.text': 'naïve: ü',
      'test.u64': 18446744073709551615n,
      'test.i64': -9223372036854775808n,
      'test.f64': 0.1,
      'test.texts': ['', '▁a', 'b'],
      'test.u16s': Uint16Array.of(1, 65535),
      'test.i32s': Int32Array.of(-1, 2147483647),
      'test.f32s': Float32Array.of(0.5, -0.25, 3),
      'test.bools': Uint8Array.of(1, 0, 1),
      'test.i64s': BigInt64Array.of(-9223372036854775808n, 7n),
    });
  });

  test('names and shapes are those of the tensors that were written, a reshaped one included', async () => {
    const expected = await openSafetensors(bytesSource(fixture('types.safetensors')));
    const shapes = (tensors: Iterable<{ name: string; shape: readonly number[] }>) =>
      Object.fromEntries([...tensors].map(({ name, shape }) => [name, shape]));
    expect(shapes(file.tensors.values())).toEqual(shapes(expected.tensors.values()));
    expect(file.tensors.get('reshaped')!.shape).toEqual([16, 16, 1, 3]);
    expect(file.tensors.get('scalar')!.shape).toEqual([]);
  });

  const plain: [string, DType][] = [
    ['f32', 'float32'],
    ['f16', 'float16'],
    ['bf16', 'bfloat16'],
    ['f64', 'float64'],
    ['i8', 'int8'],
    ['i16', 'int16'],
    ['i32', 'int32'],
    ['i64', 'int64'],
    ['scalar', 'float32'],
  ];
  test.each(plain)('%s holds the values that were written as %s', async (name, dtype) => {
    const expected = await openSafetensors(bytesSource(fixture('types.safetensors')));
    const { encoding, shape, offset, byteLength } = file.tensors.get(name)!;
    expect(encoding).toBe(dtype);
    const data = viewAs(dtype, await readExactly(file.source, offset, byteLength));
    expect(toFloat32({ dtype, shape, data })).toEqual((await readTensor(expected, name)).data);
  });

  test.each(Object.keys(blockFormats))('%s is known by its type', (type) => {
    expect(file.tensors.get(`${type}.random`)!.encoding).toBe(type);
  });

  test('version 2 is read like version 3', async () => {
    const bytes = fixture('types.gguf');
    bytes[4] = 2;
    expect((await open(bytes)).tensors).toEqual(file.tensors);
  });
});

test('a vocabulary and another alignment', async () => {
  const file = await open(fixture('t5.gguf'));
  const names: Record<string, string> = JSON.parse(new TextDecoder().decode(fixture('t5-names.json')));
  expect([...file.tensors.keys()]).toEqual(Object.keys(names));
  expect(file.metadata.get('tokenizer.ggml.tokens')).toEqual(['<pad>', '</s>', '<unk>', '▁a']);
  expect(file.metadata.get('tokenizer.ggml.scores')).toEqual(Float32Array.of(0, 0, 0, -2.5));
  for (const [number, { shape, offset }] of [...file.tensors.values()].entries()) {
    expect([shape, offset % 256]).toEqual([[1, number + 1], 0]);
    // Each holds its number, in half precision.
    const [value] = toFloat32({
      dtype: 'float16',
      shape: [1],
      data: viewAs('float16', await readExactly(file.source, offset, 2)),
    });
    expect(value).toBe(number);
  }
});

test('empty tensors, gaps, any order, no tensors and awkward names are accepted', async () => {
  const { tensors, metadata } = await open(
    header()
      .start(4, 2)
      .entry('__proto__', STRING)
      .text([0xff, 0x61])
      .entry('', ARRAY)
      .uint32(UINT8)
      .uint64(0)
      .tensor('b', [3], F32, 96)
      .tensor('__proto__', [8, 1], F32, 0)
      .tensor('"q"', [4, 0, 2], F32, 96)
      .tensor('', [0], Q8_0, 32)
      .file(108),
  );
  const dataStart = tensors.get('__proto__')!.offset;
  expect(dataStart % 32).toBe(0);
  expect([...tensors.values()]).toEqual([
    { name: 'b', encoding: 'float32', shape: [3], offset: dataStart + 96, byteLength: 12 },
    { name: '__proto__', encoding: 'float32', shape: [1, 8], offset: dataStart, byteLength: 32 },
    { name: '"q"', encoding: 'float32', shape: [2, 0, 4], offset: dataStart + 96, byteLength: 0 },
    { name: '', encoding: 'q8_0', shape: [0], offset: dataStart + 32, byteLength: 0 },
  ]);
  expect([...metadata]).toEqual([
    ['__proto__', '\ufffda'],
    ['', new Uint8Array(0)],
  ]);
  expect((await open(header().start(0, 0).file())).tensors.size).toBe(0);
});

/** A file of 2 TB that begins with `start` and goes on with what `rest` fills in; `reads` collects what is asked for. */
function vastSource(start: Uint8Array, reads: number[], rest = 0): ByteSource {
  return {
    name: 'model.gguf',
    size: 2 ** 41,
    read: async (offset, length) => {
      reads.push(length);
      const bytes = new Uint8Array(length).fill(rest);
      bytes.set(start.subarray(offset, offset + length));
      return bytes;
    },
  };
}

describe('only what the header needs is read', () => {
  test('64 KB when that is enough', async () => {
    const reads: number[] = [];
    await openGguf(vastSource(fixture('types.gguf'), reads));
    expect(reads).toEqual([65536]);
  });

  test('more, step by step, for a long vocabulary', async () => {
    const count = 50_000;
    const start = header().start(1, 2).entry('tokens', ARRAY).uint32(STRING).uint64(count);
    for (let i = 0; i < count; i++) start.text(`token ${i}`);
    start.entry('scores', ARRAY).uint32(FLOAT32).uint64(count);
    for (let i = 0; i < count; i++) start.uint32(0x3f800000);
    const bytes = start.tensor('x', [2], F32, 0).file(8);
    const reads: number[] = [];
    const { metadata, tensors }: GgufFile = await openGguf(vastSource(bytes, reads));
    expect((metadata.get('tokens') as string[]).at(-1)).toBe(`token ${count - 1}`);
    expect(metadata.get('scores')).toEqual(new Float32Array(count).fill(1));
    expect(tensors.get('x')!.offset).toBe(bytes.length - 8);
    expect(reads.at(-1)).toBeLessThan(4 * bytes.length);
    expect(reads.length).toBeLessThan(6);
  });
});

describe('a damaged file is refused in one sentence', () => {
  const one = () => header().start(1, 0);
  const entries = (count = 1) => header().start(0, count);
  const cases: [string, Uint8Array, RegExp][] = [
    ['empty', new Uint8Array(0), /ends inside its header, at byte 0/],
    ['only the mark', new TextEncoder().encode('GGUF'), /ends inside its header, at byte 4/],
    ['another format', new TextEncoder().encode('GGML'.padEnd(64)), /does not begin with "GGUF"/],
    [
      '2^64 - 1 tensors',
      header()
        .start(2n ** 64n - 1n, 0)
        .file(),
      /announces 18446744073709552000 tensors/,
    ],
    [
      '2^64 - 1 entries',
      header()
        .start(0, 2n ** 64n - 1n)
        .file(),
      /announces 18446744073709552000 metadata entries/,
    ],
    ['more tensors than fit', header().start(9, 0).file(32), /announces 9 tensors, more than fit/],
    ['more entries than fit', header().start(0, 9).file(32), /announces 9 metadata entries, more than fit/],
    ['a tensor missing', header().start(2, 0).tensor('x', [1], F32, 0).file(), /ends inside its header/],
    ['a key longer than the file', entries().uint64(60_000).file(32), /ends inside its header/],
    [
      'a key of 2^63 bytes',
      entries()
        .uint64(2n ** 63n)
        .file(32),
      /name of a metadata entry .* \d{19} bytes/,
    ],
    ['a key of 64 KB', entries().text('k'.repeat(65536)).file(), /name of a metadata entry/],
    ['a key that is not UTF-8', entries().text([0xff]).file(), /name of a metadata entry .* not UTF-8/],
    ['a key twice', entries(2).entry('k', STRING).text('').entry('k', STRING).text('').file(), /"k" twice/],
    ['an unknown value type', entries().entry('k', 13).file(8), /entry "k" is of the unknown type 13/],
    ['a text longer than the file', entries().entry('k', STRING).uint64(99).file(), /ends inside its header/],
    [
      'a text of 2^63 bytes',
      entries()
        .entry('k', STRING)
        .uint64(2n ** 63n)
        .file(),
      /ends inside its header/,
    ],
    [
      'a list longer than the file',
      entries()
        .entry('k', ARRAY)
        .uint32(UINT8)
        .uint64(2n ** 40n)
        .file(),
      /announces 1099511627776 numbers in "k"/,
    ],
    [
      'more texts than fit',
      entries()
        .entry('k', ARRAY)
        .uint32(STRING)
        .uint64(99)
        .file(99 * 8 - 33),
      /announces 99 texts in "k"/,
    ],
    ['a list of lists', entries().entry('k', ARRAY).uint32(ARRAY).uint64(1).file(32), /list of the unknown type 9/],
    ['an alignment of 0', entries().entry('general.alignment', UINT32).uint32(0).file(), /alignment/],
    ['an alignment of 48', entries().entry('general.alignment', UINT32).uint32(48).file(), /alignment/],
    ['an alignment in words', entries().entry('general.alignment', STRING).text('32').file(), /alignment/],
    ['a name longer than the file', one().uint64(999).file(32), /ends inside its header/],
    [
      'a name of 2^62 bytes',
      one()
        .uint64(2n ** 62n)
        .file(32),
      /name of a tensor .* \d{19} bytes/,
    ],
    ['five dimensions', one().tensor('x', [1, 1, 1, 1, 1], F32, 0).file(4), /"x" has 5 dimensions/],
    [
      '2^32 - 1 dimensions',
      one()
        .text('x')
        .uint32(2 ** 32 - 1)
        .file(32),
      /"x" has 4294967295 dimensions/,
    ],
    [
      'a dimension of 2^64 - 1',
      one()
        .tensor('x', [2n ** 64n - 1n], F32, 0)
        .file(4),
      /"x" has the impossible shape/,
    ],
    [
      'an overflowing product',
      one()
        .tensor('x', [2 ** 40, 2 ** 40, 0], F32, 0)
        .file(4),
      /impossible shape/,
    ],
    ['rows that are not whole blocks', one().tensor('x', [48, 2], Q8_0, 0).file(102), /rows of 48 .* Q8_0 .* of 32/],
    ['a single value in a block', one().tensor('x', [], Q8_0, 0).file(34), /rows of 1 values/],
    ['data cut off', one().tensor('x', [2], F32, 0).file(7), /ends at byte \d+, but its tensor "x"/],
    ['an offset behind the end', one().tensor('x', [2], F32, 64).file(8), /but its tensor "x"/],
    [
      'an offset of 2^64 - 32',
      one()
        .tensor('x', [2], F32, 2n ** 64n - 32n)
        .file(8),
      /but its tensor "x"/,
    ],
    ['an odd offset', one().tensor('x', [2], F32, 8).file(40), /"x" begins at byte 8, .* no multiple of 32/],
    [
      'an offset that another alignment forbids',
      header().start(1, 1).entry('general.alignment', UINT32).uint32(64).tensor('x', [2], F32, 32).file(40, 64),
      /no multiple of 64/,
    ],
    ['a tensor twice', header().start(2, 0).tensor('x', [1], F32, 0).tensor('x', [1], F32, 32).file(36), /"x" twice/],
    [
      'an overlap',
      header().start(2, 0).tensor('a', [9], F32, 0).tensor('b', [1], F32, 32).file(64),
      /"b" overlaps the one before/,
    ],
    ['one place for two', header().start(2, 0).tensor('a', [1], F32, 0).tensor('b', [1], F32, 0).file(4), /overlaps/],
  ];
  const reshaped = (type: number, shape: (start: Header) => Header) =>
    shape(header().start(1, 1).entry('comfy.gguf.orig_shape.x', type)).tensor('x', [4], F32, 0).file(16);
  cases.push(
    ['an original shape of another size', reshaped(ARRAY, (h) => h.uint32(INT32).uint64(1).uint32(5)), /no shape of/],
    [
      'a negative original shape',
      reshaped(ARRAY, (h) => h.uint32(INT32).uint64(2).uint32(0xfffffffe).uint32(0xfffffffe)),
      /no shape of/,
    ],
    [
      'a fractional original shape',
      reshaped(ARRAY, (h) => h.uint32(FLOAT32).uint64(2).uint32(0x41000000).uint32(0x3f000000)),
      /no shape of/,
    ],
    [
      'an original shape of five dimensions',
      reshaped(ARRAY, (h) => h.uint32(UINT32).uint64(5).uint32(4).uint32(1).uint32(1).uint32(1).uint32(1)),
      /no shape of/,
    ],
    ['an original shape in words', reshaped(STRING, (h) => h.text('4')), /no shape of/],
  );

  test.each(cases)('%s', async (_, bytes, message) => {
    const error = await refusal(bytes);
    expect(error.code).toBe('bad-file');
    expect(error.message).toMatch(message);
  });

  test.each(['types.gguf', 't5.gguf'])('%s cut off anywhere', async (name) => {
    const bytes = fixture(name);
    const { tensors } = await open(bytes);
    // The last tensor may be followed by padding, which may be missing.
    const needed = Math.max(...[...tensors.values()].map(({ offset, byteLength }) => offset + byteLength));
    for (let end = 0; end < needed; end += 16) {
      expect((await refusal(bytes.subarray(0, end))).code).toBe('bad-file');
    }
  });

  test('whatever bytes are changed, it is read or refused', async () => {
    const original = fixture('types.gguf').subarray(0, 4096);
    const file = fixture('types.gguf');
    let seed = 1;
    const random = (below: number) => {
      seed = (Math.imul(seed, 1664525) + 1013904223) >>> 0;
      return Math.floor((seed / 2 ** 32) * below);
    };
    let refused = 0;
    for (let round = 0; round < 1000; round++) {
      file.set(original);
      for (let changes = random(3); changes >= 0; changes--) file[4 + random(3000)] = random(256);
      await open(file).catch((error) => {
        expect(error).toBeInstanceOf(MmditxError);
        refused++;
      });
    }
    expect(refused).toBeGreaterThan(500);
  });

  test('names in messages are cut and cannot command a terminal', async () => {
    const name = `\u001b[2J\u009b2J\n${'long'.repeat(1000)}`;
    const { message } = await refusal(
      one()
        .tensor(name, [2 ** 53], F32, 0)
        .file(),
    );
    // biome-ignore lint/suspicious/noControlCharactersInRegex: their absence is what is tested
    expect(message).not.toMatch(/[\u0000-\u001f\u007f-\u009f]/);
    expect(message.length).toBeLessThan(400);
  });

  test('a file that shrinks while it is opened is noticed', async () => {
    const source = { ...bytesSource(one().file(64), 'model.gguf'), read: async () => new Uint8Array(3) };
    expect((await refusal(source)).message).toMatch(/became shorter/);
  });
});

describe('a vast file cannot make the reader read on and on', () => {
  const cases: [string, Header, RegExp][] = [
    ['millions of tensors', header().start(200_000, 0), /announces 200000 tensors, more than 100000/],
    ['millions of entries', header().start(0, 200_000), /metadata entries, more than 100000/],
    [
      'a text of 1 TB',
      header()
        .start(0, 1)
        .entry('k', STRING)
        .uint64(2 ** 40),
      /header is longer than 100000000 bytes/,
    ],
    [
      'a list of 1 TB',
      header()
        .start(0, 1)
        .entry('k', ARRAY)
        .uint32(UINT8)
        .uint64(2 ** 40),
      /numbers in "k", more than/,
    ],
    [
      'a list of 2^40 texts',
      header()
        .start(0, 1)
        .entry('k', ARRAY)
        .uint32(STRING)
        .uint64(2 ** 40),
      /texts in "k"/,
    ],
  ];
  test.each(cases)('%s', async (_, start, message) => {
    const reads: number[] = [];
    const error = await refusal(vastSource(Uint8Array.from(start.bytes), reads));
    expect(error.code).toBe('bad-file');
    expect(error.message).toMatch(message);
    expect(reads).toEqual([65536]);
  });

  test('a header that is longer than any should be', async () => {
    const reads: number[] = [];
    const long = header().start(0, 2).entry('a', STRING).uint64(60_000_000).bytes;
    const start = new Uint8Array(60_000_100);
    start.set(long);
    start.set(header().entry('b', STRING).uint64(60_000_000).bytes, long.length + 60_000_000);
    const error = await refusal(vastSource(start, reads));
    expect(error.code).toBe('bad-file');
    expect(error.message).toMatch(/header is longer than 100000000 bytes/);
    expect(reads.length).toBeLessThan(4);
    expect(Math.max(...reads)).toBeLessThanOrEqual(100_000_000);
  });
});

describe('what is not read is named', () => {
  test.each([
    ['version 1', header().start(0, 0, 1).file(), /a GGUF file of version 1, .* version 2 or 3/],
    ['a later version', header().start(0, 0, 4).file(), /version 4/],
    ['big-endian', header().start(0, 0, 0x03000000).file(), /a big-endian GGUF file/],
    [
      'a tensor of another type',
      header().start(1, 0).tensor('blk', [32], IQ4_NL, 0).file(18),
      /Tensor "blk" .* type IQ4_NL, .* F32, F16, BF16, .* Q8_0, .* Q6_K/,
    ],
    ['a tensor of an unknown type', header().start(1, 0).tensor('blk', [32], 99, 0).file(18), /type number 99/],
  ])('%s', async (_, bytes, message) => {
    const error = await refusal(bytes);
    expect(error.code).toBe('unsupported-model');
    expect(error.message).toMatch(message);
  });
});
