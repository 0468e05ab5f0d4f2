/**
 * The safetensors format: 8 bytes with the length of the header (little-endian), the header (JSON), the data.
 * Reading follows the official reader (huggingface/safetensors, `Metadata::validate`) in what it refuses:
 * tensors must fill the data section without overlaps, holes or a rest.
 * Values are read and written as they lie in memory, which is little-endian on every platform with JavaScript.
 */
import { z } from 'zod';
import { MmditxError } from '../errors.ts';
import { bytesPerElement, type DType, elementCount, type TensorData, type TypedArray } from '../tensor/data.ts';
import { foreignFileError } from './foreign.ts';
import { isCount, isText, listOf, recordOf } from './json.ts';
import { quote } from './quote.ts';

/** Bytes that can be read at any place: a `Blob`, an open file, a remote file. */
export interface ByteSource {
  /** What messages call it. */
  readonly name: string;
  /** In bytes. */
  readonly size: number;
  /** The bytes from `offset` on; fewer than `length` only where the source ends. */
  read(offset: number, length: number): Promise<Uint8Array>;
  /** Where it lies on disk, for programs that map it. */
  readonly path?: string;
  /**
   * Makes sure that the file on disk is still the one that was opened.
   * @throws MmditxError `bad-file` when it has changed or is gone
   */
  requireUnchanged?(): Promise<void>;
}

export interface TensorInfo {
  readonly name: string;
  readonly dtype: DType;
  readonly shape: readonly number[];
  /** Of the first byte, counted from the start of the file. */
  readonly offset: number;
  readonly byteLength: number;
}

/** A safetensors file whose header has been read and found sound. */
export interface SafetensorsFile {
  readonly source: ByteSource;
  readonly metadata: Readonly<Record<string, string>>;
  readonly tensors: ReadonlyMap<string, TensorInfo>;
}

const LENGTH_BYTES = 8;
/** The official reader's limit. */
const MAX_HEADER_BYTES = 100_000_000;
/** Stable Diffusion 3.5 with all its encoders has 2000 tensors. */
const MAX_TENSORS = 100_000;
/** Objects, lists and members of a header, of which a tensor's entry has seven: parsed, they take far more memory than as text. */
const MAX_HEADER_PARTS = 8 * MAX_TENSORS;
/** Enough of a file's start to recognise other formats by. */
const SNIFFED_BYTES = 512;
const METADATA_KEY = '__metadata__';

const dtypeOfTag = new Map<string, DType>([
  ['F64', 'float64'],
  ['F32', 'float32'],
  ['F16', 'float16'],
  ['BF16', 'bfloat16'],
  ['F8_E4M3', 'float8e4m3'],
  ['F8_E5M2', 'float8e5m2'],
  ['I64', 'int64'],
  ['I32', 'int32'],
  ['I16', 'int16'],
  ['I8', 'int8'],
  ['U8', 'uint8'],
  ['BOOL', 'bool'],
]);
const tagOfDtype = new Map([...dtypeOfTag].map(([tag, dtype]) => [dtype, tag]));

const metadataSchema = recordOf(isText);
const entrySchema = z.object({
  dtype: z.string(),
  shape: listOf(isCount),
  data_offsets: z.tuple([z.int().nonnegative(), z.int().nonnegative()]),
});

/** A `Blob` or `File` as a source. */
export function blobSource(blob: Blob, name: string): ByteSource {
  return {
    name,
    size: blob.size,
    read: async (offset, length) => new Uint8Array(await blob.slice(offset, offset + length).arrayBuffer()),
  };
}

/**
 * Reads and checks the header; no tensor is read.
 * @throws MmditxError `bad-file` with what is wrong; `unsupported-model` for a known format that is not this one.
 */
export async function openSafetensors(source: ByteSource): Promise<SafetensorsFile> {
  const start = await readExactly(source, 0, Math.min(source.size, SNIFFED_BYTES));
  const refuse = (found: string, remedy = 'download it again') =>
    new MmditxError('bad-file', `${source.name} is not a usable safetensors file: ${found}; ${remedy}.`);
  const refuseHeader = (found: string) => foreignFileError(source.name, start) ?? refuse(found);

  if (source.size < LENGTH_BYTES) throw refuseHeader(`it is only ${source.size} bytes long`);
  const headerBytes = Number(new DataView(start.buffer, start.byteOffset).getBigUint64(0, true));
  if (headerBytes > MAX_HEADER_BYTES) {
    throw refuseHeader(`it announces a header of ${headerBytes} bytes, more than the format allows`);
  }
  const dataStart = LENGTH_BYTES + headerBytes;
  if (dataStart > source.size) {
    throw refuseHeader(`it ends inside its header, at byte ${source.size} of ${dataStart}`);
  }
  const header = parseHeader(await readExactly(source, LENGTH_BYTES, headerBytes));
  if (typeof header === 'string') throw refuseHeader(header);

  const metadata = metadataSchema.safeParse(header[METADATA_KEY] ?? {});
  if (!metadata.success) throw refuse('its metadata is not a list of texts', 'save it again with a current tool');

  const tensors = new Map<string, TensorInfo>();
  for (const [name, value] of Object.entries(header)) {
    if (name === METADATA_KEY) continue;
    const entry = entrySchema.safeParse(value);
    if (!entry.success) {
      const field = entry.error.issues[0]?.path[0];
      throw refuse(
        `the ${field ? `${String(field)} of ` : ''}tensor ${quote(name)} in its header cannot be understood`,
      );
    }
    const { shape, data_offsets: range } = entry.data;
    const dtype = dtypeOfTag.get(entry.data.dtype);
    if (!dtype) {
      throw refuse(
        `tensor ${quote(name)} has the unsupported number format ${quote(entry.data.dtype)}`,
        `use a file in one of ${[...dtypeOfTag.keys()].join(', ')}`,
      );
    }
    const byteLength = range[1] - range[0];
    // A product too large to be exact, infinite or NaN equals no length.
    if (elementCount(shape) * bytesPerElement[dtype] !== byteLength) {
      throw refuse(
        `tensor ${quote(name)} has ${byteLength} bytes, which do not hold ${entry.data.dtype} values of shape ${quote(shape)}`,
      );
    }
    tensors.set(name, { name, dtype, shape, offset: dataStart + range[0], byteLength });
  }
  const fault = findLayoutFault(tensors.values(), dataStart, source.size);
  if (fault) throw refuse(fault);
  return { source, metadata: metadata.data, tensors };
}

/** The header's members, or what is wrong with it. */
function parseHeader(bytes: Uint8Array): Record<string, unknown> | string {
  let text: string;
  try {
    text = new TextDecoder('utf-8', { fatal: true, ignoreBOM: true }).decode(bytes);
  } catch {
    return 'its header is not UTF-8 text';
  }
  const { parts, members } = measure(text);
  if (parts > MAX_HEADER_PARTS) return `its header has room for more than ${MAX_TENSORS} tensors`;
  let value: unknown;
  try {
    value = JSON.parse(text);
  } catch {
    return 'its header is not JSON';
  }
  if (typeof value !== 'object' || value === null || Array.isArray(value)) return 'its header is not a JSON object';
  // JSON.parse keeps the last of two members of one name.
  if (members !== Object.keys(value).length) return 'its header lists one tensor twice';
  return value as Record<string, unknown>;
}

/** What JSON text holds: its objects, lists and members in all, and the members of the outermost object, those with equal names counted each. */
function measure(json: string): { parts: number; members: number } {
  let depth = 0;
  let parts = 0;
  let members = 0;
  for (let i = 0; i < json.length; i++) {
    const character = json[i];
    if (character === '"') {
      for (i++; i < json.length && json[i] !== '"'; i++) if (json[i] === '\\') i++;
    } else if (character === '{' || character === '[') {
      depth++;
      parts++;
    } else if (character === '}' || character === ']') depth--;
    else if (character === ':') {
      parts++;
      if (depth === 1) members++;
    }
  }
  return { parts, members };
}

/** Tensors must follow each other without a gap from the end of the header to the end of the file. */
function findLayoutFault(tensors: Iterable<TensorInfo>, dataStart: number, size: number): string | undefined {
  const ordered = [...tensors].sort((a, b) => a.offset - b.offset || a.byteLength - b.byteLength);
  let end = dataStart;
  for (const { name, offset, byteLength } of ordered) {
    if (offset < end) return `tensor ${quote(name)} overlaps the one before it`;
    if (offset > end) return `${offset - end} bytes before tensor ${quote(name)} belong to no tensor`;
    end = offset + byteLength;
  }
  if (end > size) return `it ends at byte ${size}, but its tensors need ${end}`;
  if (end < size) return `${size - end} bytes after its last tensor belong to no tensor`;
  return undefined;
}

/**
 * Exactly `length` bytes of a source.
 * @throws MmditxError `bad-file` when the source has become shorter since it was opened.
 */
export async function readExactly(source: ByteSource, offset: number, length: number): Promise<Uint8Array> {
  const bytes = await source.read(offset, length);
  if (bytes.length !== length) {
    throw new MmditxError(
      'bad-file',
      `${source.name} became shorter while it was being read; wait until it is complete.`,
    );
  }
  return bytes;
}

/** Reads the values of one tensor of the file. */
export async function readTensor(file: SafetensorsFile, name: string): Promise<TensorData> {
  const info = file.tensors.get(name);
  if (!info)
    throw new MmditxError('missing-part', `${file.source.name} holds no tensor ${quote(name)}; check the name.`);
  const bytes = await readExactly(file.source, info.offset, info.byteLength);
  return { dtype: info.dtype, shape: info.shape, data: viewAs(info.dtype, bytes) };
}

const arrayOfDtype: Record<DType, new (buffer: ArrayBuffer, offset: number, length: number) => TypedArray> = {
  float64: Float64Array,
  float32: Float32Array,
  float16: Uint16Array,
  bfloat16: Uint16Array,
  float8e4m3: Uint8Array,
  float8e5m2: Uint8Array,
  int64: BigInt64Array,
  int32: Int32Array,
  int16: Int16Array,
  int8: Int8Array,
  uint8: Uint8Array,
  bool: Uint8Array,
};

/** Bytes of a file as values, without a copy where they are aligned. */
export function viewAs(dtype: DType, bytes: Uint8Array): TypedArray {
  const size = bytesPerElement[dtype];
  const { buffer, byteOffset, length } = bytes.byteOffset % size === 0 ? bytes : bytes.slice();
  return new arrayOfDtype[dtype](buffer as ArrayBuffer, byteOffset, length / size);
}

type TensorPlan = Pick<TensorData, 'dtype' | 'shape'>;

function plannedBytes({ dtype, shape }: TensorPlan): number {
  return elementCount(shape) * bytesPerElement[dtype];
}

/** Length and header of a file whose tensors lie in this order. */
function fileStart(
  tensors: readonly (readonly [string, TensorPlan])[],
  metadata: Readonly<Record<string, string>>,
): Uint8Array {
  const header: [string, unknown][] = Object.keys(metadata).length ? [[METADATA_KEY, metadata]] : [];
  let end = 0;
  for (const [name, tensor] of tensors) {
    if (name === METADATA_KEY) throw new RangeError(`A tensor cannot be named ${METADATA_KEY}.`);
    const start = end;
    end += plannedBytes(tensor);
    header.push([name, { dtype: tagOfDtype.get(tensor.dtype), shape: tensor.shape, data_offsets: [start, end] }]);
  }
  const json = new TextEncoder().encode(JSON.stringify(Object.fromEntries(header)));
  const padded = Math.ceil(json.length / LENGTH_BYTES) * LENGTH_BYTES;
  const start = new Uint8Array(LENGTH_BYTES + padded).fill(' '.charCodeAt(0));
  new DataView(start.buffer).setBigUint64(0, BigInt(padded), true);
  start.set(json, LENGTH_BYTES);
  return start;
}

/** Values as they go into a file; throws when they are not what its header announces. */
function bytesOf(name: string, { dtype, shape }: TensorPlan, data: TypedArray): Uint8Array {
  if (data.length !== elementCount(shape) || data.BYTES_PER_ELEMENT !== bytesPerElement[dtype]) {
    throw new RangeError(`The values of tensor ${quote(name)} are not ${dtype} of shape ${quote(shape)}.`);
  }
  return new Uint8Array(data.buffer, data.byteOffset, data.byteLength);
}

/**
 * The bytes of a safetensors file in order: its header, then tensor after tensor. Tensors with larger elements come
 * first, so that each is aligned, and names decide among equals, so that equal content gives equal files.
 */
export function* safetensorsChunks(
  tensors: ReadonlyMap<string, TensorData>,
  metadata: Readonly<Record<string, string>> = {},
): Generator<Uint8Array> {
  const ordered = [...tensors].sort(
    ([nameA, a], [nameB, b]) => bytesPerElement[b.dtype] - bytesPerElement[a.dtype] || (nameA < nameB ? -1 : 1),
  );
  const chunks = ordered.map(([name, tensor]) => bytesOf(name, tensor, tensor.data));
  yield fileStart(ordered, metadata);
  yield* chunks;
}

/** Tensors of a file to be written that are made together, when their turn comes. */
export interface PlannedTensors {
  readonly tensors: ReadonlyMap<string, TensorPlan>;
  /** The values of each, in the order of `tensors`. */
  values(): Promise<readonly TypedArray[]>;
}

/** The bytes of a safetensors file whose tensors do not fit into memory together, in the order in which they are given. */
export async function* plannedSafetensorsChunks(
  plans: readonly PlannedTensors[],
  metadata: Readonly<Record<string, string>> = {},
): AsyncGenerator<Uint8Array> {
  yield fileStart(
    plans.flatMap(({ tensors }) => [...tensors]),
    metadata,
  );
  for (const { tensors, values } of plans) {
    const made = await values();
    for (const [i, [name, tensor]] of [...tensors].entries()) yield bytesOf(name, tensor, made[i]!);
  }
}

/** Bytes that {@link plannedSafetensorsChunks} gives. */
export function plannedSafetensorsBytes(
  plans: readonly PlannedTensors[],
  metadata: Readonly<Record<string, string>> = {},
): number {
  const tensors = plans.flatMap((plan) => [...plan.tensors]);
  return tensors.reduce((sum, [, tensor]) => sum + plannedBytes(tensor), fileStart(tensors, metadata).length);
}

/** A whole safetensors file in memory. */
export function serializeSafetensors(
  tensors: ReadonlyMap<string, TensorData>,
  metadata: Readonly<Record<string, string>> = {},
): Uint8Array {
  const chunks = [...safetensorsChunks(tensors, metadata)];
  const bytes = new Uint8Array(chunks.reduce((total, chunk) => total + chunk.length, 0));
  let end = 0;
  for (const chunk of chunks) {
    bytes.set(chunk, end);
    end += chunk.length;
  }
  return bytes;
}
