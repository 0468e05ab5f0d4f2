/** How models ask for their weights. */

import type { Tensor } from '../tensor/index.ts';

/**
 * The weight of a name, as float32, in the shape the model computes with; the checkpoint may store it in another
 * element type, or in another shape with as many elements.
 */
export type Weights = (name: string, shape: readonly number[]) => Tensor;

/** The weights whose names start with a prefix, named without it. */
export function within(weights: Weights, prefix: string): Weights {
  return (name, shape) => weights(`${prefix}.${name}`, shape);
}
