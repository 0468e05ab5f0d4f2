import { readFileSync } from 'node:fs';
import type { DType, TensorData, TypedArray } from '../../src/tensor/data.ts';

/** How each element type of the golden files is held in memory. */
const elementTypes: Record<string, { dtype: DType; view: (buffer: ArrayBuffer) => TypedArray }> = {
  F64: { dtype: 'float64', view: (buffer) => new Float64Array(buffer) },
  F32: { dtype: 'float32', view: (buffer) => new Float32Array(buffer) },
  F16: { dtype: 'float16', view: (buffer) => new Uint16Array(buffer) },
  BF16: { dtype: 'bfloat16', view: (buffer) => new Uint16Array(buffer) },
  I64: { dtype: 'int64', view: (buffer) => new BigInt64Array(buffer) },
  I32: { dtype: 'int32', view: (buffer) => new Int32Array(buffer) },
  I16: { dtype: 'int16', view: (buffer) => new Int16Array(buffer) },
  I8: { dtype: 'int8', view: (buffer) => new Int8Array(buffer) },
  U8: { dtype: 'uint8', view: (buffer) => new Uint8Array(buffer) },
  BOOL: { dtype: 'bool', view: (buffer) => new Uint8Array(buffer) },
};

/**
 * The tensors of `test/golden/NAME.safetensors`, read at once.
 * A deliberately separate reader from the one under `src/weights`, so that a fault there cannot hide in its own tests.
 */
export function readGolden(name: string): Map<string, TensorData> {
  const file = readFileSync(new URL(`../golden/${name}.safetensors`, import.meta.url));
  const headerEnd = 8 + Number(file.readBigUInt64LE(0));
  const header = JSON.parse(file.toString('utf8', 8, headerEnd));
  const tensors = new Map<string, TensorData>();
  for (const [key, entry] of Object.entries<{ dtype: string; shape: number[]; data_offsets: [number, number] }>(
    header,
  )) {
    if (key === '__metadata__') continue;
    const element = elementTypes[entry.dtype];
    if (!element) throw new Error(`${name}: ${key} has the unknown element type ${entry.dtype}`);
    const [begin, end] = entry.data_offsets;
    const bytes = Uint8Array.from(file.subarray(headerEnd + begin, headerEnd + end));
    tensors.set(key, { dtype: element.dtype, shape: entry.shape, data: element.view(bytes.buffer) });
  }
  return tensors;
}

/** One golden tensor by name; a missing name is an error, never `undefined`. */
export function golden(tensors: Map<string, TensorData>, name: string): TensorData {
  const tensor = tensors.get(name);
  if (!tensor) throw new Error(`no golden tensor named ${name}`);
  return tensor;
}

/** The largest absolute difference of two equally long sequences; NaN anywhere gives NaN, a length mismatch infinity. */
export function maxDifference(actual: ArrayLike<number | bigint>, expected: ArrayLike<number | bigint>): number {
  if (actual.length !== expected.length) return Number.POSITIVE_INFINITY;
  let worst = 0;
  for (let i = 0; i < actual.length; i++) worst = Math.max(worst, Math.abs(Number(actual[i]) - Number(expected[i])));
  return worst;
}
