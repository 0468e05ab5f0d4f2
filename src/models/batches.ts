/** Joining and cutting tensors along their first axis. */

import { elementCount, type FloatTensor, floats } from '../tensor/index.ts';

/** Items of several tensors in one batch. */
export function joinBatches(parts: readonly FloatTensor[]): FloatTensor {
  const first = parts[0]!;
  if (parts.length === 1) return first;
  const data = new Float32Array(parts.reduce((sum, part) => sum + part.data.length, 0));
  let offset = 0;
  for (const part of parts) {
    data.set(part.data, offset);
    offset += part.data.length;
  }
  return floats([parts.reduce((sum, { shape }) => sum + shape[0]!, 0), ...first.shape.slice(1)], data);
}

/** `count` items from `start`, sharing memory with the batch. */
export function batchItems(batch: FloatTensor, start: number, count: number): FloatTensor {
  const shape = [count, ...batch.shape.slice(1)];
  const size = elementCount(batch.shape.slice(1));
  return floats(shape, batch.data.subarray(start * size, (start + count) * size));
}

/** A batch of one item repeated `count` times; a batch of `count` items as it is. */
export function repeatTo(batch: FloatTensor, count: number): FloatTensor {
  return batch.shape[0] === count ? batch : joinBatches(Array.from({ length: count }, () => batch));
}
