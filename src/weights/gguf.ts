/**
 * The GGUF format of ggml, versions 2 and 3 (ggml's `docs/gguf.md`): metadata, then a list of tensors, then their
 * bytes, each tensor's beginning at a multiple of the alignment. Reading follows ggml in what it refuses (`gguf.cpp`:
 * names twice, arrays of arrays, rows that are not whole blocks), but allows gaps between tensors.
 */

import { MmditxError } from '../errors.ts';
import { bytesPerElement } from '../tensor/data.ts';
import { blockFormats } from './gguf-blocks.ts';
import { quote } from './quote.ts';
import { type ByteSource, readExactly } from './safetensors.ts';
import { type Encoding, isBlockType, type StoredTensor } from './stored.ts';

/** Numbers of one type, or truth values as 0 and 1. */
export type GgufNumbers =
  | Uint8Array
  | Int8Array
  | Uint16Array
  | Int16Array
  | Uint32Array
  | Int32Array
  | Float32Array
  | Float64Array
  | BigUint64Array
  | BigInt64Array;

/** A metadata entry. Integers of 64 bits are `bigint`. */
export type GgufValue = string | number | bigint | boolean | readonly string[] | GgufNumbers;

/** A GGUF file whose header has been read and found sound. */
export interface GgufFile {
  readonly source: ByteSource;
  readonly metadata: ReadonlyMap<string, GgufValue>;
  /** By their names in the file; shapes are row-major, as safetensors has them. */
  readonly tensors: ReadonlyMap<string, StoredTensor>;
}

const MARK = 'GGUF';
/** Read at first; enough for the header of a transformer without a vocabulary. */
const FIRST_BYTES = 1 << 16;
/** More is read by this factor, so that reading again from the start costs little. */
const GROWTH = 4;
/** As in safetensors. Headers with the largest vocabularies have some tens of MB. */
const MAX_HEADER_BYTES = 100_000_000;
/** Of tensors and of metadata entries; Stable Diffusion 3.5 with all its encoders has 2000 tensors. */
const MAX_ENTRIES = 100_000;
/** Of a tensor's or an entry's name, the format's limit. */
const MAX_NAME_BYTES = 0xffff;
/** ggml's GGML_MAX_DIMS. */
const MAX_DIMENSIONS = 4;
const ALIGNMENT_KEY = 'general.alignment';
const DEFAULT_ALIGNMENT = 32;
/** ComfyUI-GGUF's entry with the row-major shape of a tensor that it stored in another one, for the sake of its rows. */
const SHAPE_KEY = 'comfy.gguf.orig_shape.';

/** Tensor types by their numbers in `ggml.h`. */
const encodings = new Map<number, { readonly title: string; readonly encoding: Encoding }>([
  [0, { title: 'F32', encoding: 'float32' }],
  [1, { title: 'F16', encoding: 'float16' }],
  [30, { title: 'BF16', encoding: 'bfloat16' }],
  [28, { title: 'F64', encoding: 'float64' }],
  [24, { title: 'I8', encoding: 'int8' }],
  [25, { title: 'I16', encoding: 'int16' }],
  [26, { title: 'I32', encoding: 'int32' }],
  [27, { title: 'I64', encoding: 'int64' }],
  [8, { title: 'Q8_0', encoding: 'q8_0' }],
  [2, { title: 'Q4_0', encoding: 'q4_0' }],
  [3, { title: 'Q4_1', encoding: 'q4_1' }],
  [6, { title: 'Q5_0', encoding: 'q5_0' }],
  [7, { title: 'Q5_1', encoding: 'q5_1' }],
  [10, { title: 'Q2_K', encoding: 'q2_k' }],
  [11, { title: 'Q3_K', encoding: 'q3_k' }],
  [12, { title: 'Q4_K', encoding: 'q4_k' }],
  [13, { title: 'Q5_K', encoding: 'q5_k' }],
  [14, { title: 'Q6_K', encoding: 'q6_k' }],
]);

/** Types that are not read. */
const otherTypes = new Map([
  [9, 'Q8_1'],
  [15, 'Q8_K'],
  [16, 'IQ2_XXS'],
  [17, 'IQ2_XS'],
  [18, 'IQ3_XXS'],
  [19, 'IQ1_S'],
  [20, 'IQ4_NL'],
  [21, 'IQ3_S'],
  [22, 'IQ2_S'],
  [23, 'IQ4_XS'],
  [29, 'IQ1_M'],
  [34, 'TQ1_0'],
  [35, 'TQ2_0'],
  [39, 'MXFP4'],
  [40, 'NVFP4'],
  [41, 'Q1_0'],
]);

interface NumberType {
  read(view: DataView, at: number): number | bigint | boolean;
  readonly array: { readonly BYTES_PER_ELEMENT: number; new (length: number): GgufNumbers };
}

/** Metadata types of fixed size by their numbers. */
const numberTypes = new Map<number, NumberType>([
  [0, { read: (view, at) => view.getUint8(at), array: Uint8Array }],
  [1, { read: (view, at) => view.getInt8(at), array: Int8Array }],
  [2, { read: (view, at) => view.getUint16(at, true), array: Uint16Array }],
  [3, { read: (view, at) => view.getInt16(at, true), array: Int16Array }],
  [4, { read: (view, at) => view.getUint32(at, true), array: Uint32Array }],
  [5, { read: (view, at) => view.getInt32(at, true), array: Int32Array }],
  [6, { read: (view, at) => view.getFloat32(at, true), array: Float32Array }],
  [7, { read: (view, at) => view.getUint8(at) !== 0, array: Uint8Array }],
  [10, { read: (view, at) => view.getBigUint64(at, true), array: BigUint64Array }],
  [11, { read: (view, at) => view.getBigInt64(at, true), array: BigInt64Array }],
  [12, { read: (view, at) => view.getFloat64(at, true), array: Float64Array }],
]);
const STRING_TYPE = 8;
const ARRAY_TYPE = 9;

/** Least bytes of parts of the header: a string without characters, an entry, a tensor without dimensions. */
const LEAST_STRING = 8;
const LEAST_ENTRY = LEAST_STRING + 4 + 1;
const LEAST_TENSOR = LEAST_STRING + 4 + 4 + 8;

/** Makes the error of a file with a fault. */
type Refuse = (fault: string, remedy?: string) => MmditxError;

/**
 * Reads and checks the header; no tensor is read.
 * @throws MmditxError `bad-file` with what is wrong; `unsupported-model` for other versions, big-endian files and
 *   tensors in formats that are not read
 */
export async function openGguf(source: ByteSource): Promise<GgufFile> {
  const limit = Math.min(source.size, MAX_HEADER_BYTES);
  let length = Math.min(FIRST_BYTES, limit);
  for (;;) {
    const bytes = await readExactly(source, 0, length);
    try {
      return { source, ...parseHeader(bytes, source) };
    } catch (error) {
      if (!(error instanceof HeaderGoesOn)) throw error;
      length = Math.min(Math.max(error.end, length * GROWTH), limit);
    }
  }
}

/** Thrown where the header goes on behind the bytes at hand, to byte `end` at least. */
class HeaderGoesOn {
  readonly end: number;

  constructor(end: number) {
    this.end = end;
  }
}

/** Reads a header that lies in `bytes`, the start of `source`. */
function parseHeader(bytes: Uint8Array, source: ByteSource): Pick<GgufFile, 'metadata' | 'tensors'> {
  const refuse: Refuse = (fault, remedy = 'download it again') =>
    new MmditxError('bad-file', `${source.name} is not a usable GGUF file: ${fault}; ${remedy}.`);
  const header = headerReader(bytes, source.size, refuse);

  const mark = bytes.subarray(0, MARK.length);
  if (String.fromCharCode(...mark) !== MARK.slice(0, mark.length)) {
    throw refuse(`it does not begin with ${quote(MARK)}`, 'give a GGUF file');
  }
  header.skip(MARK.length);
  checkVersion(header.uint32(), source.name);
  const tensorCount = header.count('tensors', LEAST_TENSOR, MAX_ENTRIES);
  const entryCount = header.count('metadata entries', LEAST_ENTRY, MAX_ENTRIES);

  const metadata = new Map<string, GgufValue>();
  for (let i = 0; i < entryCount; i++) {
    const key = header.name('a metadata entry');
    if (metadata.has(key)) throw refuse(`its metadata lists ${quote(key)} twice`);
    metadata.set(key, readValue(header, key, refuse));
  }
  const alignment = metadata.get(ALIGNMENT_KEY) ?? DEFAULT_ALIGNMENT;
  if (typeof alignment !== 'number' || !Number.isInteger(Math.log2(alignment)) || alignment < 1) {
    throw refuse('its alignment is not a power of two');
  }

  const listed: ListedTensor[] = [];
  for (let i = 0; i < tensorCount; i++) listed.push(readTensorInfo(header, source.name, refuse));
  const dataStart = Math.ceil(header.position() / alignment) * alignment;

  const tensors = new Map<string, StoredTensor>();
  for (const { name, encoding, dimensions, start, byteLength } of listed) {
    if (tensors.has(name)) throw refuse(`its header lists tensor ${quote(name)} twice`);
    if (start % alignment !== 0) {
      throw refuse(`tensor ${quote(name)} begins at byte ${start}, which is no multiple of ${alignment}`);
    }
    const shape = originalShape(metadata.get(SHAPE_KEY + name), name, dimensions, refuse) ?? dimensions.toReversed();
    tensors.set(name, { name, encoding, shape, offset: dataStart + start, byteLength });
  }
  const fault = findLayoutFault(tensors.values(), source.size);
  if (fault) throw refuse(fault);
  return { metadata, tensors };
}

function checkVersion(version: number, file: string): void {
  const refuse = (is: string) =>
    new MmditxError(
      'unsupported-model',
      `${file} is ${is}, which is not read; use a little-endian GGUF file of version 2 or 3.`,
    );
  // A small number has its zeros in front when its bytes are reversed.
  if (version !== 0 && (version & 0xffff) === 0) throw refuse('a big-endian GGUF file');
  if (version !== 2 && version !== 3) throw refuse(`a GGUF file of version ${version}`);
}

/** Reads the parts of a header one after the other. */
interface HeaderReader {
  /** Of the next byte. */
  position(): number;
  /** Moves past bytes and returns where they begin. */
  skip(length: number): number;
  uint32(): number;
  /** An integer of 64 bits, inexact above 2^53. */
  uint64(): number;
  /** A number of `things`, each of which takes `least` bytes or more. */
  count(things: string, least: number, most?: number): number;
  /** The name of `thing`. */
  name(thing: string): string;
  string(): string;
  /** A number at the next byte. */
  number(type: NumberType): number | bigint | boolean;
  numbers(type: NumberType, count: number): GgufNumbers;
}

/** @throws HeaderGoesOn from all its methods when more bytes are needed; what `refuse` makes when there are none */
function headerReader(bytes: Uint8Array, fileSize: number, refuse: Refuse): HeaderReader {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.length);
  const limit = Math.min(fileSize, MAX_HEADER_BYTES);
  let position = 0;

  const skip = (length: number) => {
    const start = position;
    position += length;
    if (position > limit) {
      throw refuse(
        limit < fileSize
          ? `its header is longer than ${MAX_HEADER_BYTES} bytes`
          : `it ends inside its header, at byte ${fileSize}`,
      );
    }
    if (position > bytes.length) throw new HeaderGoesOn(position);
    return start;
  };
  const uint64 = () => Number(view.getBigUint64(skip(8), true));
  const text = (decoder: TextDecoder, length: number) => {
    const start = skip(length);
    return decoder.decode(bytes.subarray(start, start + length));
  };

  return {
    position: () => position,
    skip,
    uint32: () => view.getUint32(skip(4), true),
    uint64,
    count(things, least, most = Number.POSITIVE_INFINITY) {
      const count = uint64();
      if (count > most || count * least > limit - position) {
        throw refuse(`it announces ${count} ${things}, more than ${count > most ? most : 'fit into it'}`);
      }
      return count;
    },
    name(thing) {
      const length = uint64();
      if (length > MAX_NAME_BYTES) throw refuse(`the name of ${thing} in its header has ${length} bytes`);
      try {
        return text(strictUtf8, length);
      } catch (error) {
        if (error instanceof TypeError) throw refuse(`the name of ${thing} in its header is not UTF-8 text`);
        throw error;
      }
    },
    // Pieces of a vocabulary need not be whole characters.
    string: () => text(utf8, uint64()),
    number: ({ read, array }) => read(view, skip(array.BYTES_PER_ELEMENT)),
    numbers({ array }, count) {
      const start = skip(count * array.BYTES_PER_ELEMENT);
      const values = new array(count);
      new Uint8Array(values.buffer).set(bytes.subarray(start, position));
      return values;
    },
  };
}

const utf8 = new TextDecoder('utf-8', { ignoreBOM: true });
const strictUtf8 = new TextDecoder('utf-8', { ignoreBOM: true, fatal: true });

/** Reads the type and the value of a metadata entry. */
function readValue(header: HeaderReader, key: string, refuse: Refuse): GgufValue {
  const type = header.uint32();
  if (type === STRING_TYPE) return header.string();
  const numbers = numberTypes.get(type);
  if (numbers) return header.number(numbers);
  if (type !== ARRAY_TYPE) throw refuse(`its metadata entry ${quote(key)} is of the unknown type ${type}`);

  const elementType = header.uint32();
  if (elementType === STRING_TYPE) {
    const count = header.count(`texts in ${quote(key)}`, LEAST_STRING);
    const texts: string[] = [];
    for (let i = 0; i < count; i++) texts.push(header.string());
    return texts;
  }
  const elements = numberTypes.get(elementType);
  if (!elements) throw refuse(`its metadata entry ${quote(key)} is a list of the unknown type ${elementType}`);
  return header.numbers(elements, header.count(`numbers in ${quote(key)}`, elements.array.BYTES_PER_ELEMENT));
}

interface ListedTensor {
  readonly name: string;
  readonly encoding: Encoding;
  /** In the file's order, the one along which values lie side by side first. */
  readonly dimensions: readonly number[];
  /** Counted from the start of the data. */
  readonly start: number;
  readonly byteLength: number;
}

function readTensorInfo(header: HeaderReader, file: string, refuse: Refuse): ListedTensor {
  const name = header.name('a tensor');
  const dimensionCount = header.uint32();
  if (dimensionCount > MAX_DIMENSIONS) {
    throw refuse(`tensor ${quote(name)} has ${dimensionCount} dimensions, more than ${MAX_DIMENSIONS}`);
  }
  const dimensions = Array.from({ length: dimensionCount }, () => header.uint64());
  const type = header.uint32();
  const start = header.uint64();

  const known = encodings.get(type);
  if (!known) {
    const titles = [...encodings.values()].map(({ title }) => title);
    throw new MmditxError(
      'unsupported-model',
      `Tensor ${quote(name)} of ${file} is of the type ${otherTypes.get(type) ?? `number ${type}`}, which is not read; use a file with tensors of the types ${titles.join(', ')}.`,
    );
  }
  const { encoding, title } = known;
  const count = exactProduct(dimensions);
  if (count === undefined) throw refuse(`tensor ${quote(name)} has the impossible shape ${quote(dimensions)}`);
  const { valuesPerBlock, bytesPerBlock } = isBlockType(encoding)
    ? blockFormats[encoding]
    : { valuesPerBlock: 1, bytesPerBlock: bytesPerElement[encoding] };
  const row = dimensions[0] ?? 1;
  if (row % valuesPerBlock !== 0) {
    throw refuse(
      `tensor ${quote(name)} has rows of ${row} values, but ${title} stores them in blocks of ${valuesPerBlock}`,
    );
  }
  return { name, encoding, dimensions, start, byteLength: (count / valuesPerBlock) * bytesPerBlock };
}

/** The product of whole numbers where it and all that lead to it are exact. */
function exactProduct(factors: readonly number[]): number | undefined {
  let product = 1;
  for (const factor of factors) {
    product *= factor;
    if (!Number.isSafeInteger(product)) return undefined;
  }
  return product;
}

/** The row-major shape that the metadata give a tensor; undefined where they do not. */
function originalShape(
  entry: GgufValue | undefined,
  name: string,
  dimensions: readonly number[],
  refuse: Refuse,
): readonly number[] | undefined {
  if (entry === undefined) return undefined;
  if (typeof entry === 'object' && entry.length <= MAX_DIMENSIONS) {
    const shape = Array.from(entry, Number);
    const whole = shape.every((size) => Number.isSafeInteger(size) && size >= 0);
    if (whole && exactProduct(shape) === exactProduct(dimensions)) return shape;
  }
  throw refuse(`its metadata entry ${quote(SHAPE_KEY + name)} is no shape of that tensor's values`);
}

/** Tensors must lie inside the file, none over another. */
function findLayoutFault(tensors: Iterable<StoredTensor>, size: number): string | undefined {
  const ordered = [...tensors].sort((a, b) => a.offset - b.offset || a.byteLength - b.byteLength);
  let end = 0;
  for (const { name, offset, byteLength } of ordered) {
    if (offset < end) return `tensor ${quote(name)} overlaps the one before it`;
    end = offset + byteLength;
    if (end > size) return `it ends at byte ${size}, but its tensor ${quote(name)} at byte ${end}`;
  }
  return undefined;
}
