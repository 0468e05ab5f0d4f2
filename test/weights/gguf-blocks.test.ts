import { readFileSync } from 'node:fs';
import { describe, expect, test } from 'vitest';
import { openGguf } from '../../src/weights/gguf.ts';
import { type BlockType, blockFormats, decodeBlocks } from '../../src/weights/gguf-blocks.ts';
import { openSafetensors, readExactly, readTensor } from '../../src/weights/safetensors.ts';
import { bytesSource } from './sources.ts';

const fixture = (name: string) => bytesSource(readFileSync(new URL(`../fixtures/gguf/${name}`, import.meta.url)), name);
const encoded = await openGguf(fixture('types.gguf'));
const expected = await openSafetensors(fixture('types.safetensors'));

/** Bit patterns, which tell zeros of different signs apart. */
const bits = (values: Float32Array) => new Uint32Array(values.buffer, values.byteOffset, values.length);

async function bytesOf(name: string): Promise<Uint8Array> {
  const { offset, byteLength } = encoded.tensors.get(name)!;
  return readExactly(encoded.source, offset, byteLength);
}

const types = Object.keys(blockFormats) as BlockType[];
const tensors = [...encoded.tensors.values()].filter(({ encoding }) => encoding in blockFormats);

describe("values are those of ggml's reference, to the last bit", () => {
  test('the fixture has every type', () => {
    expect(new Set(tensors.map(({ encoding }) => encoding))).toEqual(new Set(types));
  });

  test.each(tensors.map(({ name, encoding }) => [name, encoding as BlockType]))('%s', async (name, type) => {
    const { data } = await readTensor(expected, name);
    const values = new Float32Array(data.length);
    decodeBlocks(type, await bytesOf(name), values);
    expect(values.some((value) => value !== 0)).toBe(true);
    expect(bits(values)).toEqual(bits(data as Float32Array));
  });
});

test('a block worked out by hand', () => {
  // Scale -0.5; low halves hold 0, 1, 2, .. 15, high halves all 9.
  const block = Uint8Array.of(0x00, 0xb8, ...Array.from({ length: 16 }, (_, i) => 0x90 | i));
  const values = new Float32Array(32);
  decodeBlocks('q4_0', block, values);
  expect([...values]).toEqual([...Array.from({ length: 16 }, (_, i) => (i - 8) * -0.5), ...Array(16).fill(-0.5)]);
});

test.each(types)('%s: some of the blocks, at any place in memory and in the result', async (type) => {
  const { valuesPerBlock, bytesPerBlock } = blockFormats[type];
  const name = `${type}.random`;
  const data = (await readTensor(expected, name)).data as Float32Array;
  const shifted = new Uint8Array(1 + 2 * bytesPerBlock);
  shifted.set((await bytesOf(name)).subarray(bytesPerBlock, 3 * bytesPerBlock), 1);
  const values = new Float32Array(3 + 2 * valuesPerBlock + 1).fill(7);
  decodeBlocks(type, shifted.subarray(1), values, 3);
  expect([...values.subarray(0, 3), values.at(-1)]).toEqual([7, 7, 7, 7]);
  expect(values.subarray(3, -1)).toEqual(data.slice(valuesPerBlock, 3 * valuesPerBlock));
});

test('scales that are not finite stay so', () => {
  const values = new Float32Array(64);
  const infinite = Uint8Array.of(0x00, 0x7c, ...Array(32).fill(0xff));
  const nan = Uint8Array.of(0x01, 0x7e, ...Array(32).fill(1));
  decodeBlocks('q8_0', Uint8Array.of(...infinite, ...nan), values);
  expect([values[0], values[32]]).toEqual([Number.NEGATIVE_INFINITY, Number.NaN]);
});

test('half a block and too short a result are refused', () => {
  const out = new Float32Array(32);
  decodeBlocks('q8_0', new Uint8Array(0), out, 32);
  expect(() => decodeBlocks('q8_0', new Uint8Array(33), out)).toThrow(RangeError);
  expect(() => decodeBlocks('q8_0', new Uint8Array(34), out, 1)).toThrow(RangeError);
  expect(() => decodeBlocks('q8_0', new Uint8Array(34), out, -1)).toThrow(RangeError);
});
