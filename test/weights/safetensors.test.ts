import { describe, expect, test } from 'vitest';
import { MmditxError } from '../../src/errors.ts';
import { type DType, floats, type TensorData, type TypedArray, toFloat32 } from '../../src/tensor/data.ts';
import { fileSource } from '../../src/weights/files.node.ts';
import { openSafetensors, readTensor, serializeSafetensors } from '../../src/weights/safetensors.ts';
import { bytesSource, rawSafetensors } from './sources.ts';

const golden = new URL('../golden/train_model.safetensors', import.meta.url).pathname;

async function refusal(bytes: Uint8Array): Promise<MmditxError> {
  const error = await openSafetensors(bytesSource(bytes)).then(
    () => undefined,
    (caught) => caught,
  );
  expect(error).toBeInstanceOf(MmditxError);
  // One sentence that names the file.
  expect(error.message).toMatch(/^[^\n]*file\.safetensors[^\n]*\.$/);
  return error;
}

const entry = (dtype: string, shape: unknown, offsets: unknown) => ({ dtype, shape, data_offsets: offsets });
const headed = (header: object, bytes: number) => rawSafetensors(JSON.stringify(header), bytes);

describe('writing and reading back', () => {
  const values: Record<DType, TypedArray> = {
    float64: Float64Array.of(Math.PI, -0),
    float32: Float32Array.of(1.5, Number.NaN),
    float16: Uint16Array.of(0x3c00, 0x7c01),
    bfloat16: Uint16Array.of(0x3f80, 0xff80),
    float8e4m3: Uint8Array.of(0x38, 0x7f),
    float8e5m2: Uint8Array.of(0x3c, 0x80),
    int64: BigInt64Array.of(-(2n ** 62n), 7n),
    int32: Int32Array.of(-5, 2 ** 30),
    int16: Int16Array.of(-300, 300),
    int8: Int8Array.of(-128, 127),
    uint8: Uint8Array.of(0, 255),
    bool: Uint8Array.of(0, 1),
  };

  test.each(Object.entries(values))('%s keeps every bit', async (dtype, data) => {
    const tensor: TensorData = { dtype: dtype as DType, shape: [1, 2], data };
    // A neighbour of odd length puts the second tensor at an odd offset if the writer does not see to alignment.
    const pad: TensorData = { dtype: 'uint8', shape: [3], data: Uint8Array.of(1, 2, 3) };
    const file = await openSafetensors(
      bytesSource(
        serializeSafetensors(
          new Map([
            ['pad', pad],
            ['x', tensor],
          ]),
          { format: 'pt' },
        ),
      ),
    );
    expect(file.metadata).toEqual({ format: 'pt' });
    const read = await readTensor(file, 'x');
    expect(read.dtype).toBe(dtype);
    expect(read.shape).toEqual([1, 2]);
    expect(read.data).toEqual(data);
    expect((await readTensor(file, 'pad')).data).toEqual(pad.data);
  });

  test('scalars, empty tensors, no tensors and awkward names survive', async () => {
    const tensors = new Map<string, TensorData>([
      ['scalar', floats([], [3])],
      ['empty', floats([0, 4], [])],
      ['__proto__', floats([1], [1])],
      ['naïve "quoted": {}\\', floats([2], [1, 2])],
      ['7', floats([1], [7])],
    ]);
    const file = await openSafetensors(bytesSource(serializeSafetensors(tensors)));
    expect([...file.tensors.keys()].sort()).toEqual([...tensors.keys()].sort());
    for (const [name, { data, shape }] of tensors) {
      expect(await readTensor(file, name)).toMatchObject({ data, shape });
    }
    expect((await openSafetensors(bytesSource(serializeSafetensors(new Map())))).tensors.size).toBe(0);
  });

  test('equal content gives equal bytes, whatever the order', () => {
    const a: [string, TensorData] = ['a', floats([1], [1])];
    const b: [string, TensorData] = ['b', floats([1], [2])];
    expect(serializeSafetensors(new Map([a, b]))).toEqual(serializeSafetensors(new Map([b, a])));
  });

  test('the header ends at a multiple of 8 and starts with a brace, as other readers expect', () => {
    const bytes = serializeSafetensors(new Map([['odd name', floats([1], [1])]]));
    const length = Number(new DataView(bytes.buffer).getBigUint64(0, true));
    expect(length % 8).toBe(0);
    expect(bytes[8]).toBe('{'.charCodeAt(0));
    expect(bytes.length).toBe(8 + length + 4);
  });

  test('values that do not fit their shape or type are refused before anything is written', () => {
    const wrong: TensorData = { dtype: 'float16', shape: [2], data: Float32Array.of(1, 2) };
    expect(() => serializeSafetensors(new Map([['x', wrong]]))).toThrow(RangeError);
    expect(() => serializeSafetensors(new Map([['x', { ...floats([2], [1, 2]), shape: [3] }]]))).toThrow(RangeError);
    expect(() => serializeSafetensors(new Map([['__metadata__', floats([], [1])]]))).toThrow(RangeError);
  });
});

test('a file of the reference writer is read, unaligned tensors included', async () => {
  const source = await fileSource(golden);
  const file = await openSafetensors(source);
  expect(file.tensors.size).toBe(89);
  const table = await readTensor(file, 'model.diffusion_model.pos_embed');
  expect([table.dtype, table.shape]).toEqual(['float16', [1, 144, 64]]);
  const floatTable = toFloat32(table);
  expect(floatTable.every((value) => Math.abs(value) <= 1)).toBe(true);
  // The second half of a row encodes the patch row: 16 sines, then 16 cosines with sin² + cos² = 1.
  expect(floatTable[32]! ** 2 + floatTable[48]! ** 2).toBeCloseTo(1, 2);
  await expect(readTensor(file, 'nonsense')).rejects.toThrow(/holds no tensor "nonsense"/);
  await source.close();

  const header = rawSafetensors(JSON.stringify({ a: entry('U8', [1], [0, 1]), b: entry('F32', [1], [1, 5]) }), 5);
  new DataView(header.buffer).setFloat32(header.length - 4, 2.5, true);
  expect((await readTensor(await openSafetensors(bytesSource(header)), 'b')).data).toEqual(Float32Array.of(2.5));
});

describe('a damaged file is refused in one sentence', () => {
  const good = { x: entry('F32', [2], [0, 8]) };
  const cases: [string, Uint8Array, RegExp][] = [
    ['empty', new Uint8Array(0), /only 0 bytes/],
    ['shorter than the length', new Uint8Array(5), /only 5 bytes/],
    ['header length 0', rawSafetensors('', 16), /header is not JSON/],
    ['header longer than the file', rawSafetensors('{}', 0, 1000n), /ends inside its header, at byte 10 of 1008/],
    ['header length of 2^63', rawSafetensors('{}', 0, 2n ** 63n), /more than the format allows/],
    ['header over 100 MB', rawSafetensors('{}', 0, 100_000_001n), /more than the format allows/],
    ['not UTF-8', rawSafetensors(Uint8Array.of(0x7b, 0xff, 0x7d)), /not UTF-8/],
    ['not JSON', rawSafetensors('{"x": '), /not JSON/],
    ['an array', rawSafetensors('[1, 2]'), /not a JSON object/],
    ['null', rawSafetensors('null'), /not a JSON object/],
    [
      'a tensor twice',
      rawSafetensors(`{"x":${JSON.stringify(good.x)},"\\u0078":${JSON.stringify(good.x)}}`, 8),
      /twice/,
    ],
    ['metadata of numbers', headed({ __metadata__: { a: 1 }, ...good }, 8), /metadata/],
    ['an entry that is a number', headed({ x: 3 }, 8), /tensor "x"/],
    ['an unknown number format', headed({ x: entry('F4', [2], [0, 1]) }, 1), /unsupported number format "F4"/],
    ['a negative dimension', headed({ x: entry('F32', [-2], [0, 8]) }, 8), /shape of tensor "x"/],
    ['a fractional dimension', headed({ x: entry('F32', [0.5, 4], [0, 8]) }, 8), /shape of tensor "x"/],
    ['a dimension above 2^53', headed({ x: entry('F32', [2 ** 60], [0, 8]) }, 8), /shape of tensor "x"/],
    ['an overflowing product', headed({ x: entry('U8', Array(99).fill(2 ** 53 - 1), [0, 8]) }, 8), /do not hold/],
    ['infinity times zero', headed({ x: entry('U8', [...Array(99).fill(2 ** 53 - 1), 0], [0, 8]) }, 8), /do not hold/],
    ['bytes that do not match', headed({ x: entry('F32', [3], [0, 8]) }, 8), /8 bytes, which do not hold F32/],
    ['a reversed range', headed({ x: entry('F32', [2], [8, 0]) }, 8), /do not hold/],
    ['a negative offset', headed({ x: entry('F32', [2], [-8, 0]) }, 8), /data_offsets of tensor "x"/],
    ['three offsets', headed({ x: entry('F32', [2], [0, 8, 8]) }, 8), /data_offsets of tensor "x"/],
    ['data cut off', headed(good, 7), /ends at byte \d+, but its tensors need/],
    ['data after the last tensor', headed(good, 9), /1 bytes after its last tensor/],
    ['a hole', headed({ a: entry('U8', [2], [0, 2]), b: entry('U8', [2], [3, 5]) }, 5), /1 bytes before tensor "b"/],
    ['an overlap', headed({ a: entry('U8', [4], [0, 4]), b: entry('U8', [4], [3, 7]) }, 7), /"b" overlaps/],
  ];
  test.each(cases)('%s', async (_, bytes, message) => {
    const error = await refusal(bytes);
    expect(error.code).toBe('bad-file');
    expect(error.message).toMatch(message);
  });

  test('names in messages are cut and cannot command a terminal', async () => {
    const name = `\u001b[2J\u009b2J\n${'long'.repeat(1000)}`;
    const { message } = await refusal(headed({ [name]: 1 }, 0));
    // biome-ignore lint/suspicious/noControlCharactersInRegex: their absence is what is tested
    expect(message).not.toMatch(/[\u0000-\u001f\u007f-\u009f]/);
    expect(message.length).toBeLessThan(400);
  });

  test('a file that shrinks while it is read is noticed', async () => {
    const whole = bytesSource(headed(good, 8));
    const file = await openSafetensors(whole);
    const shrunk = { ...file, source: { ...whole, read: async () => new Uint8Array(3) } };
    await expect(readTensor(shrunk, 'x')).rejects.toThrow(/became shorter/);
  });
});

describe('files of other formats are named', () => {
  const text = (start: string) => Uint8Array.from(start.padEnd(64), (character) => character.charCodeAt(0));
  test.each([
    ['GGUF', text('GGUF\u0003\0\0\0'), /is a GGUF file/],
    ['a PyTorch zip', text('PK\u0003\u0004\0\0\b\b\0\0'), /pickle/],
    ['an old pickle', text('\u0080\u0002\u008a\nl\u00fc\u009cF'), /pickle/],
    ['a Git LFS pointer', text('version https://git-lfs.github.com/spec/v1\noid sha256:0'), /git lfs pull/],
    ['a web page', text('\n<!DOCTYPE html><html>'), /web page/],
    ['an index of shards', text('{\n  "metadata": {}, "weight_map": {}}'), /JSON text without weights/],
  ])('%s', async (_, bytes, message) => {
    expect((await refusal(bytes)).message).toMatch(message);
  });

  test('a safetensors file whose length looks like a pickle is not mistaken for one', async () => {
    const header = JSON.stringify({ x: entry('F32', [2], [0, 8]) }).padEnd(0x280);
    const bytes = rawSafetensors(header, 8);
    expect([bytes[0], bytes[1]]).toEqual([0x80, 0x02]);
    expect((await openSafetensors(bytesSource(bytes))).tensors.size).toBe(1);
    expect((await refusal(bytes.subarray(0, 100))).message).toMatch(/ends inside its header/);
  });
});
