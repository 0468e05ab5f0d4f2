/**
 * Prompts to what the transformer attends to: tokens through the three encoders, weighted and joined as ComfyUI and
 * Stability's code do it. Encoders that are missing are replaced by zeros or left out.
 */

import { MmditxError } from '../errors.ts';
import { batchItems } from '../models/batches.ts';
import type { ClipEncoder, T5Encoder } from '../models/text-encoders.ts';
import type { RunOptions } from '../runtime/runtime.ts';
import { type FloatTensor, floats, type TensorData } from '../tensor/data.ts';
import { applyTokenWeights, type EncoderTokens, isWeighted, type PromptTokens } from './tokens.ts';

/** A prompt as the transformer takes it. */
export interface Conditioning {
  /** [1, length, contextWidth] */
  readonly context: FloatTensor;
  /** [1, pooledWidth] */
  readonly pooled: FloatTensor;
}

/** The encoders at hand, and the widths that the transformer expects of all three together. */
export interface Encoders {
  readonly clipL?: ClipEncoder | undefined;
  readonly clipG?: ClipEncoder | undefined;
  readonly t5?: T5Encoder | undefined;
  readonly contextWidth: number;
  readonly pooledWidth: number;
}

export interface EncodeOptions extends RunOptions {
  /**
   * What stands for T5's tokens when T5 is missing: nothing (`omit`, ComfyUI and the default) or as many zeros as are
   * given here (diffusers, Stability's code: 77 or 256).
   */
  missingT5?: 'omit' | number;
}

/** Hidden states and pooled vectors, of a batch or joined to those of one prompt. */
interface Encoded {
  readonly hidden: FloatTensor;
  readonly pooled?: FloatTensor;
}

/**
 * Encodes prompts. Each encoder runs once for all of them, so that a large one loads once.
 * @throws MmditxError `missing-part` when no encoder is there, `not-finite` when an encoder fails
 */
export async function encodePrompts(
  prompts: readonly PromptTokens[],
  encoders: Encoders,
  { missingT5 = 'omit', ...run }: EncodeOptions = {},
): Promise<Conditioning[]> {
  const { clipL, clipG, t5 } = encoders;
  const left = await encodeRows(
    'CLIP-L',
    prompts.map((tokens) => clipL && tokens.clipL),
    (ids) => clipL!.encode(ids, run),
  );
  const right = await encodeRows(
    'CLIP-G',
    prompts.map((tokens) => clipG && tokens.clipG),
    (ids) => clipG!.encode(ids, run),
  );
  const long = await encodeRows(
    'T5',
    prompts.map((tokens) => t5 && tokens.t5),
    async (ids) => ({ hidden: await t5!.encode(ids, run) }),
  );
  return prompts.map((_, i) => conditioning(encoders, missingT5, left[i], right[i], long[i]));
}

/** Joins what the encoders made of one prompt. */
function conditioning(
  encoders: Encoders,
  missingT5: 'omit' | number,
  clipL: Encoded | undefined,
  clipG: Encoded | undefined,
  t5: Encoded | undefined,
): Conditioning {
  const { contextWidth, pooledWidth } = encoders;
  const [widthL, widthG] = clipWidths(encoders);
  const parts: FloatTensor[] = [];
  const length = clipL?.hidden.shape[1] ?? clipG?.hidden.shape[1];
  // Columns of a missing CLIP stay zero, as do those beyond both.
  if (length) parts.push(sideBySide(length, contextWidth, [clipL?.hidden, 0], [clipG?.hidden, widthL]));
  if (t5) parts.push(t5.hidden);
  else if (typeof missingT5 === 'number')
    parts.push(floats([1, missingT5, contextWidth], new Float32Array(missingT5 * contextWidth)));
  if (parts.length === 0) {
    throw new MmditxError('missing-part', 'The model has no text encoder; add files with CLIP-L, CLIP-G or T5.');
  }
  const pooled = new Float32Array(pooledWidth);
  if (clipL) pooled.set(clipL.pooled!.data);
  if (clipG) pooled.set(clipG.pooled!.data, pooledWidth - widthG);
  return { context: joinTokens(parts), pooled: floats([1, pooledWidth], pooled) };
}

/** Widths of CLIP-L and CLIP-G; that of a missing one is what the other leaves of the pooled vector. */
function clipWidths({ clipL, clipG, pooledWidth }: Encoders): [number, number] {
  const widthG = clipG?.config.pooledWidth ?? pooledWidth - (clipL?.config.pooledWidth ?? pooledWidth);
  return [clipL?.config.width ?? pooledWidth - widthG, widthG];
}

/** Runs an encoder over the rows of all prompts that have any, those of one length in one batch. */
async function encodeRows(
  name: string,
  prompts: readonly (EncoderTokens | undefined)[],
  encode: (ids: TensorData) => Promise<Encoded>,
): Promise<(Encoded | undefined)[]> {
  const results: (Encoded | undefined)[] = prompts.map(() => undefined);
  const lengths = new Set(prompts.flatMap((tokens) => (tokens ? [tokens.rows[0]!.ids.length] : [])));
  for (const length of lengths) {
    const batch: Int32Array[] = [];
    const starts = new Map<number, number>();
    for (const [i, tokens] of prompts.entries()) {
      if (!tokens || tokens.rows[0]!.ids.length !== length) continue;
      starts.set(i, batch.length);
      batch.push(...tokens.rows.map(({ ids }) => ids));
      if (isWeighted(tokens)) batch.push(tokens.empty);
    }
    const { hidden, pooled } = await encode(idsTensor(batch));
    requireFinite(name, hidden);
    for (const [i, start] of starts) {
      const tokens = prompts[i]!;
      const weighted = isWeighted(tokens);
      const own = batchItems(hidden, start, tokens.rows.length + (weighted ? 1 : 0));
      // The pooled vector is that of the first chunk.
      const first = pooled && batchItems(pooled, start, 1);
      results[i] = { hidden: weightRows(tokens, own, weighted), ...(first && { pooled: first }) };
    }
  }
  return results;
}

function idsTensor(rows: readonly Int32Array[]): TensorData {
  const length = rows[0]!.length;
  const data = new Int32Array(rows.length * length);
  for (const [i, row] of rows.entries()) data.set(row, i * length);
  return { dtype: 'int32', shape: [rows.length, length], data };
}

/** [rows (+ the empty prompt), length, width] to [1, rows * length, width] with each token's weight applied. */
function weightRows(tokens: EncoderTokens, hidden: FloatTensor, weighted: boolean): FloatTensor {
  const [, length, width] = hidden.shape as [number, number, number];
  const size = length * width;
  const count = tokens.rows.length;
  if (!weighted) return floats([1, count * length, width], hidden.data);
  const data = new Float32Array(count * size);
  const empty = hidden.data.subarray(count * size);
  for (const [i, { weights }] of tokens.rows.entries()) {
    data.set(applyTokenWeights(hidden.data.subarray(i * size, (i + 1) * size), weights, empty), i * size);
  }
  return floats([1, count * length, width], data);
}

/** Tensors [1, length, *] in columns of one [1, length, width]. */
function sideBySide(
  length: number,
  width: number,
  ...parts: readonly (readonly [tensor: FloatTensor | undefined, column: number])[]
): FloatTensor {
  const data = new Float32Array(length * width);
  for (const [tensor, column] of parts) {
    if (!tensor) continue;
    const own = tensor.shape[2]!;
    for (let token = 0; token < length; token++) {
      data.set(tensor.data.subarray(token * own, (token + 1) * own), token * width + column);
    }
  }
  return floats([1, length, width], data);
}

function joinTokens(parts: readonly FloatTensor[]): FloatTensor {
  const width = parts[0]!.shape[2]!;
  const length = parts.reduce((sum, { shape }) => sum + shape[1]!, 0);
  const data = new Float32Array(length * width);
  let offset = 0;
  for (const part of parts) {
    data.set(part.data, offset);
    offset += part.data.length;
  }
  return floats([1, length, width], data);
}

function requireFinite(name: string, { data }: FloatTensor): void {
  if (!Number.isFinite(data.reduce((sum, value) => sum + value, 0))) {
    throw new MmditxError(
      'not-finite',
      `The ${name} text encoder gives values that are not finite; check its weights.`,
    );
  }
}
