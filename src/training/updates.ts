/** Applying AdamW to all parameters of a model: here one after the other, in `updates.node.ts` in two threads. */

import { type AdamWOptions, adamwStep, squaredNorm } from './adamw.ts';

/** A parameter with its moments, as they are before a step; a step may replace the arrays. */
export interface ParameterState {
  parameter: Float32Array;
  first: Float32Array;
  second: Float32Array;
}

export interface UpdateOptions extends AdamWOptions {
  /** Counts from 1. */
  readonly step: number;
  readonly learningRate: number;
  /** Largest norm of all gradients together; larger ones are scaled down. */
  readonly clip: number;
  /** Whether the loss is a number; where it is none, or the norm is not finite, nothing is changed. */
  readonly finite: boolean;
}

export interface Updater {
  /**
   * One step on all parameters.
   * @param gradients in the order of `states`; they may be gone afterwards
   * @returns the norm of all gradients before clipping (torch's `clip_grad_norm_`)
   */
  update(
    states: readonly ParameterState[],
    gradients: readonly Float32Array[],
    options: UpdateOptions,
  ): Promise<number>;
}

/** Updates in the calling thread. */
export const plainUpdater: Updater = {
  async update(states, gradients, options) {
    const norm = Math.sqrt(sumOfSquares(gradients));
    if (options.finite && Number.isFinite(norm)) updateAll(states, gradients, options, norm);
    return norm;
  },
};

export function sumOfSquares(gradients: readonly Float32Array[]): number {
  return gradients.reduce((sum, gradient) => sum + squaredNorm(gradient), 0);
}

/** @param norm of the gradients of all parameters, of which these may be a part */
export function updateAll(
  states: readonly ParameterState[],
  gradients: readonly Float32Array[],
  { step, learningRate, clip, ...adamw }: UpdateOptions,
  norm: number,
): void {
  const scale = norm > clip ? clip / norm : 1;
  for (const [i, state] of states.entries()) {
    adamwStep(state.parameter, gradients[i]!, state, step, learningRate, adamw, scale);
  }
}
