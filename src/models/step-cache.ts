/**
 * The first-block cache: from one noise level to the next most of the transformer does nearly the same. What its first
 * block does tells how nearly, and below a threshold the other blocks' work of an earlier step is used again.
 *
 * After the first block cache of ParaAttention (chengzeyi/ParaAttention; also huggingface/diffusers,
 * `FirstBlockCacheConfig`). TeaCache (arXiv 2411.19108) judges by the input of the first block instead, with a
 * polynomial fitted to each model.
 */

import { MmditxError } from '../errors.ts';
import { type FloatTensor, floats } from '../tensor/index.ts';
import type { TransformerPass } from './transformer.ts';

/**
 * On the small model about a third of the evaluations are reused, and what changes in the pictures has to be looked for
 * (`bench/step-cache.ts`). ParaAttention uses 0.08 for FLUX, diffusers presets 0.05.
 */
export const DEFAULT_CACHE_THRESHOLD = 0.1;

/** Reused evaluations in a row: how far the blocks left out have moved is only guessed from the first one. */
const DEFAULT_MAX_CONSECUTIVE = 3;

export interface StepCacheOptions {
  /**
   * How much the work of the first block may differ from that of the last step computed in full, for the other blocks
   * to be left out: mean |difference| / mean |work|, 0 to 1. 0 computes everything, with the same results as no cache.
   */
  readonly threshold: number;
  /** Most evaluations in a row that are not computed in full, from 1 (default 3). */
  readonly maxConsecutive?: number;
  /** 1000 * sigma of the run's last evaluation, which is computed in full; from 0 (default 0: it may be reused). */
  readonly lastTimestep?: number;
}

/** The image tokens of a pass around the first block, [batch, rows, columns, hidden]. */
export interface FirstBlock {
  readonly pass: TransformerPass;
  readonly before: FloatTensor;
  readonly after: FloatTensor;
}

/** Remembers the last evaluation that was computed in full. For one sampling run: the steps of another differ. */
export interface StepCache {
  /** Evaluations so far that were computed in full. */
  readonly computed: number;
  /** Evaluations so far that left out all blocks but the first. */
  readonly reused: number;
  /**
   * The image tokens after the last block, one tensor for each pass: what `compute` gives, or those after the first
   * block plus what the other blocks added last time. All passes of an evaluation are reused or none is, because
   * guidance magnifies the difference between them; and so are all items of a batch.
   */
  afterLastBlock(
    passes: readonly FirstBlock[],
    timesteps: ArrayLike<number>,
    compute: () => Promise<readonly FloatTensor[]>,
  ): Promise<readonly FloatTensor[]>;
}

/** What is known of a pass from the last evaluation that was computed in full. */
interface Known {
  readonly pass: TransformerPass;
  /** What the first block added to the image tokens. */
  readonly first: FloatTensor;
  /** What all others added. */
  readonly others: FloatTensor;
}

/** @throws MmditxError `bad-option` for options out of range */
export function createStepCache({
  threshold,
  maxConsecutive = DEFAULT_MAX_CONSECUTIVE,
  lastTimestep = 0,
}: StepCacheOptions): StepCache {
  requireCacheThreshold(threshold);
  if (!Number.isSafeInteger(maxConsecutive) || maxConsecutive < 1) {
    throw new MmditxError('bad-option', `The step cache may reuse ${maxConsecutive} steps in a row; give 1 or more.`);
  }
  if (!(lastTimestep >= 0 && Number.isFinite(lastTimestep))) {
    throw new MmditxError('bad-option', `The last timestep is ${lastTimestep}; it must be 0 or more.`);
  }
  let known: readonly Known[] = [];
  let [computed, reused, inRow] = [0, 0, 0];

  return {
    get computed() {
      return computed;
    },
    get reused() {
      return reused;
    },
    async afterLastBlock(passes, timesteps, compute) {
      const first = workOfFirstBlock(passes);
      const earlier = passes.map(({ pass, after }) => known.find((entry) => isSame(entry, pass, after)));
      const isLast = Array.from(timesteps).some((timestep) => Math.fround(timestep) <= Math.fround(lastTimestep));
      const changes = earlier.flatMap((entry, i) => (entry ? relativeChanges(first[i]!, entry.first) : [Number.NaN]));
      // With nothing to judge by, everything is computed.
      const isNear = changes.length > 0 && changes.every((change) => change < threshold);
      if (isNear && !isLast && inRow < maxConsecutive) {
        reused++;
        inRow++;
        return passes.map(({ after }, i) => combined(after, earlier[i]!.others, 1));
      }
      const last = await compute();
      known = passes.map(({ pass, after }, i) => ({ pass, first: first[i]!, others: combined(last[i]!, after, -1) }));
      computed++;
      inRow = 0;
      return last;
    },
  };
}

/** @throws MmditxError `bad-option` for a threshold out of range */
export function requireCacheThreshold(threshold: number): void {
  if (threshold >= 0 && threshold <= 1) return;
  throw new MmditxError('bad-option', `The threshold of the step cache is ${threshold}; it must be 0 to 1.`);
}

/** A pass is known by its text, which one sampling run does not copy, the layers it skips and its size. */
function isSame({ pass, first }: Known, { context, pooled, skipLayers }: TransformerPass, { shape }: FloatTensor) {
  return (
    pass.context === context &&
    pass.pooled === pooled &&
    String(pass.skipLayers ?? []) === String(skipLayers ?? []) &&
    String(first.shape) === String(shape)
  );
}

/** What the first block added, once for passes that share their tokens up to there. */
function workOfFirstBlock(passes: readonly FirstBlock[]): FloatTensor[] {
  const work = new Map<FloatTensor, FloatTensor>();
  for (const { before, after } of passes) if (!work.has(after)) work.set(after, combined(after, before, -1));
  return passes.map(({ after }) => work.get(after)!);
}

/** tokens + sign * others */
function combined(tokens: FloatTensor, others: FloatTensor, sign: 1 | -1): FloatTensor {
  const data = new Float32Array(tokens.data.length);
  for (let i = 0; i < data.length; i++) data[i] = tokens.data[i]! + sign * others.data[i]!;
  return floats(tokens.shape, data);
}

/** mean |now - then| / mean |then| of each item; none where `then` is zero, as in a pass that skips the first block. */
function relativeChanges(now: FloatTensor, then: FloatTensor): number[] {
  const size = now.data.length / now.shape[0]!;
  const changes: number[] = [];
  for (let start = 0; start < now.data.length; start += size) {
    let [difference, scale] = [0, 0];
    for (let i = start; i < start + size; i++) {
      difference += Math.abs(now.data[i]! - then.data[i]!);
      scale += Math.abs(then.data[i]!);
    }
    if (scale !== 0) changes.push(difference / scale);
  }
  return changes;
}
