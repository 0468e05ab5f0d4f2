/** How the values of a weight lie in files: as numbers or in blocks, in one piece or in several. */

import {
  type DType,
  elementCount,
  type FloatTensor,
  floats,
  type TensorData,
  type TypedArray,
  toFloat32,
} from '../tensor/data.ts';
import type { QuantizedPrecision } from '../tensor/quantized.ts';
import { type BlockType, blockFormats, decodeBlocks } from './gguf-blocks.ts';
import { dequantized } from './quantized.ts';
import { type ByteSource, readExactly, viewAs } from './safetensors.ts';

/** How a file writes values: each as a number, or in blocks with scales of their own (GGUF). */
export type Encoding = DType | BlockType;

/** A tensor of a file of any format. */
export interface StoredTensor {
  readonly name: string;
  readonly encoding: Encoding;
  readonly shape: readonly number[];
  /** Of the first byte, counted from the start of the file. */
  readonly offset: number;
  readonly byteLength: number;
}

/** A file of weights whose header has been read and found sound. */
export interface WeightsFile {
  readonly source: ByteSource;
  readonly metadata: Readonly<Record<string, string>>;
  readonly tensors: ReadonlyMap<string, StoredTensor>;
}

/** Values that lie together in a file: a tensor of it, or some of its rows. */
export interface Span extends StoredTensor {
  readonly source: ByteSource;
  /** Factor on every value ("scaled fp8"). */
  readonly scale?: number;
}

/** A weight under the name and in the shape that the network knows. */
export interface WeightTensor {
  /** In the file; where several tensors make up the weight, the first of them. */
  readonly name: string;
  readonly shape: readonly number[];
  /** Its values, joined along the first axis. */
  readonly spans: readonly Span[];
  /** Set where the values are integers with scales of their own (`quantized.ts`). */
  readonly quantized?: Quantized;
}

export interface Quantized {
  readonly precision: QuantizedPrecision;
  /** One for each span of values. */
  readonly scales: readonly Span[];
}

/** A whole tensor of a file as a weight. */
export function wholeTensor({ source }: WeightsFile, tensor: StoredTensor): WeightTensor {
  return { name: tensor.name, shape: tensor.shape, spans: [{ ...tensor, source }] };
}

/** Pieces of equal shape that follow each other in a span. */
export function equalParts(span: Span, shape: readonly number[], parts: number): Span[] {
  const byteLength = span.byteLength / parts;
  return Array.from({ length: parts }, (_, i) => ({
    ...span,
    shape,
    offset: span.offset + i * byteLength,
    byteLength,
  }));
}

/** Bytes that a weight takes in its files. */
export function storedBytes({ spans, quantized }: WeightTensor): number {
  return [...spans, ...(quantized?.scales ?? [])].reduce((sum, { byteLength }) => sum + byteLength, 0);
}

export function isBlockType(encoding: Encoding): encoding is BlockType {
  return encoding in blockFormats;
}

/**
 * Reads the values of a weight: as stored where they are one plain tensor, else as float32.
 * @throws MmditxError `bad-file` when a file has become shorter since it was opened
 */
export async function readWeight(weight: WeightTensor): Promise<TensorData> {
  const [first, ...more] = weight.spans as [Span, ...Span[]];
  if (more.length === 0 && first.scale === undefined && !isBlockType(first.encoding) && !weight.quantized) {
    return { dtype: first.encoding, shape: weight.shape, data: await readSpan(first) };
  }
  return readFloats(weight);
}

/** Reads the values of a weight as float32, whatever it is stored as. */
export async function readFloats(weight: WeightTensor): Promise<FloatTensor> {
  const { shape, spans, quantized } = weight;
  if (quantized) {
    const read = (pieces: readonly Span[]) => Promise.all(pieces.map(readSpan));
    return floats(shape, dequantized(weight, await read(spans), await read(quantized.scales)));
  }
  const data = new Float32Array(elementCount(shape));
  let end = 0;
  for (const span of spans) {
    const values = decode(span, await readExactly(span.source, span.offset, span.byteLength));
    data.set(values, end);
    end += values.length;
  }
  return floats(shape, data);
}

/** The values of a span of a plain element type. */
export async function readSpan({ source, name, encoding, offset, byteLength }: Span): Promise<TypedArray> {
  if (isBlockType(encoding)) throw new RangeError(`Tensor ${name} is stored in blocks.`);
  return viewAs(encoding, await readExactly(source, offset, byteLength));
}

/** The values of bytes that a span begins with, or of all of it. */
export function decode({ encoding, scale }: Pick<Span, 'encoding' | 'scale'>, bytes: Uint8Array): Float32Array {
  let values: Float32Array;
  if (isBlockType(encoding)) {
    const { valuesPerBlock, bytesPerBlock } = blockFormats[encoding];
    values = new Float32Array((bytes.length / bytesPerBlock) * valuesPerBlock);
    decodeBlocks(encoding, bytes, values);
  } else {
    values = toFloat32({ dtype: encoding, shape: [], data: viewAs(encoding, bytes) });
  }
  return scale === undefined ? values : values.map((value) => value * scale);
}
