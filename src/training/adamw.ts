/** AdamW: Adam with decoupled weight decay (Loshchilov and Hutter 2019), as torch.optim.AdamW computes it. */

export interface AdamWOptions {
  /** Decay of the mean of gradients (default 0.9). */
  beta1?: number;
  /** Decay of the mean of squared gradients (default 0.999). */
  beta2?: number;
  /** Added to the root of the second moment (default 1e-8). */
  eps?: number;
  /** Share of a parameter taken off per unit of learning rate (default 0.01). */
  weightDecay?: number;
}

/** Moments of one parameter, changed in place by each step. */
export interface Moments {
  readonly first: Float32Array;
  readonly second: Float32Array;
}

export function zeroMoments(length: number): Moments {
  return { first: new Float32Array(length), second: new Float32Array(length) };
}

/**
 * Updates a parameter in place.
 * @param step counts from 1
 * @param scale factor on the gradient, for clipping and accumulation (default 1)
 */
export function adamwStep(
  parameter: Float32Array,
  gradient: Float32Array,
  { first, second }: Moments,
  step: number,
  learningRate: number,
  { beta1 = 0.9, beta2 = 0.999, eps = 1e-8, weightDecay = 0.01 }: AdamWOptions = {},
  scale = 1,
): void {
  const keep = 1 - learningRate * weightDecay;
  const rate = learningRate / (1 - beta1 ** step);
  const inverse = 1 / Math.sqrt(1 - beta2 ** step);
  for (let i = 0; i < parameter.length; i++) {
    const g = gradient[i]! * scale;
    const m = beta1 * first[i]! + (1 - beta1) * g;
    const v = beta2 * second[i]! + (1 - beta2) * g * g;
    first[i] = m;
    second[i] = v;
    parameter[i] = keep * parameter[i]! - (rate * m) / (Math.sqrt(v) * inverse + eps);
  }
}

/** The sum of squares of a tensor's values. */
export function squaredNorm(values: Float32Array): number {
  let sum = 0;
  for (let i = 0; i < values.length; i++) sum += values[i]! * values[i]!;
  return sum;
}

/** The L2 norm of all gradients together, as torch's `clip_grad_norm_` computes it. */
export function globalNorm(gradients: Iterable<Float32Array>): number {
  let sum = 0;
  for (const gradient of gradients) sum += squaredNorm(gradient);
  return Math.sqrt(sum);
}
