import type { DType, TensorData } from '../../src/tensor/data.ts';
import { bytesPerElement, elementCount } from '../../src/tensor/data.ts';
import type { TensorShapes } from '../../src/weights/expected.ts';
import { type ByteSource, blobSource, serializeSafetensors } from '../../src/weights/safetensors.ts';

/** Bytes as a file called `name`. */
export function bytesSource(bytes: Uint8Array, name = 'file.safetensors'): ByteSource {
  return blobSource(new Blob([bytes as Uint8Array<ArrayBuffer>]), name);
}

/** Length, header and data, whatever they say. */
export function rawSafetensors(
  header: string | Uint8Array,
  data: Uint8Array | number = 0,
  length?: bigint,
): Uint8Array {
  const text = typeof header === 'string' ? new TextEncoder().encode(header) : header;
  const rest = typeof data === 'number' ? new Uint8Array(data) : data;
  const bytes = new Uint8Array(8 + text.length + rest.length);
  new DataView(bytes.buffer).setBigUint64(0, length ?? BigInt(text.length), true);
  bytes.set(text, 8);
  bytes.set(rest, 8 + text.length);
  return bytes;
}

const tags: Partial<Record<DType, string>> = { float32: 'F32', float16: 'F16', bfloat16: 'BF16', uint8: 'U8' };

/** Only the header of a file with these tensors, and how long the whole file would be. */
export function headerOf(
  shapes: TensorShapes,
  dtype: DType = 'float16',
  metadata: Record<string, string> = {},
): { header: Uint8Array; size: number } {
  const entries: Record<string, unknown> = { __metadata__: metadata };
  let end = 0;
  for (const [name, shape] of shapes) {
    const start = end;
    end += elementCount(shape) * bytesPerElement[dtype];
    entries[name] = { dtype: tags[dtype], shape, data_offsets: [start, end] };
  }
  const header = rawSafetensors(JSON.stringify(entries));
  return { header, size: header.length + end };
}

/** A file that has a header and, for whoever reads further, zeros. */
export function shapesSource(
  shapes: TensorShapes,
  name = 'model.safetensors',
  metadata: Record<string, string> = {},
  dtype: DType = 'float16',
): ByteSource {
  const { header, size } = headerOf(shapes, dtype, metadata);
  return {
    name,
    size,
    read: async (offset, length) => {
      const bytes = new Uint8Array(Math.min(length, size - offset));
      bytes.set(header.subarray(offset, offset + bytes.length));
      return bytes;
    },
  };
}

export function prefixed(prefix: string, shapes: TensorShapes): Map<string, readonly number[]> {
  return new Map([...shapes].map(([name, shape]) => [prefix + name, shape]));
}

export function tensorsSource(tensors: Record<string, TensorData>, metadata: Record<string, string> = {}): ByteSource {
  return bytesSource(serializeSafetensors(new Map(Object.entries(tensors)), metadata));
}
