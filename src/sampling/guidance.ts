/**
 * Guidance: several predictions of the model, with and without the prompt or some of its layers, made into one.
 */
import { MmditxError } from '../errors.ts';
import { type FloatTensor, floats } from '../tensor/data.ts';
import { DEFAULT_SHIFT, percentToSigma } from './schedules.ts';
import type { Denoiser } from './steps.ts';

/** One way of asking the model: with the prompt, with the negative prompt, or with the prompt but without some blocks. */
export type Pass = 'positive' | 'negative' | 'positive-skipping-layers';

export interface VelocityRequest {
  /** Noisy latent [batch, channels, height / 8, width / 8]. */
  readonly latent: FloatTensor;
  /** Noise level in (0, 1]. */
  readonly sigma: number;
  /** What to predict, all for the same latent, so that the model may batch passes or share work between them. */
  readonly passes: readonly Pass[];
  /** Indices of the transformer blocks that the pass `positive-skipping-layers` leaves out; empty without that pass. */
  readonly skipLayers: readonly number[];
  readonly signal?: AbortSignal;
}

/** Predicts the velocity noise - x0, of the latent's shape, once for each pass and in the order of `passes`. */
export type VelocityModel = (request: VelocityRequest) => Promise<readonly FloatTensor[]>;

/**
 * Skip-layer guidance: pushes away from what the model predicts when some blocks are left out
 * (Stability AI's reference implementation of Stable Diffusion 3.5).
 */
export interface SkipLayerGuidance {
  /** Indices of the blocks to leave out. */
  readonly layers: readonly number[];
  /** Strength, 0 or more. */
  readonly scale: number;
  /** Where guidance begins and ends, as shares 0..1 of the way from noise to image. */
  readonly start: number;
  readonly end: number;
  /**
   * What `start` and `end` are shares of.
   * `steps`: the number of steps; active in call i (from 0) when `start * steps < i < end * steps` (Stability, diffusers).
   * `sigma`: the shifted training levels; active from `percentToSigma(start)` down to `percentToSigma(end)`, both ends
   * included (ComfyUI).
   */
  readonly rule: 'steps' | 'sigma';
}

export interface GuidanceOptions {
  readonly velocity: VelocityModel;
  /** Shape of the latent, [batch, channels, height / 8, width / 8]. */
  readonly shape: readonly number[];
  /** Classifier-free guidance scale: 1 ignores the negative prompt and does not compute it. */
  readonly cfg: number;
  readonly skipLayer?: SkipLayerGuidance;
  /** Steps of the whole schedule, before image to image shortens it; the rule `steps` counts against them. */
  readonly steps: number;
  /** Timestep shift of the schedule, for the rule `sigma`; default 3. */
  readonly shift?: number;
  /** Handed on to the model. */
  readonly signal?: AbortSignal;
}

/**
 * A denoiser for one sampling run (it counts its calls): with v the velocities,
 * `v = v_negative + cfg * (v_positive - v_negative) + scale * (v_positive - v_skipping)` and `x0 = latent - sigma * v`.
 * The references guide x0 instead of v, which is the same by linearity.
 *
 * @throws MmditxError `bad-option` for guidance that makes no sense; its calls throw `not-finite` when the model fails
 */
export function guidedDenoiser(options: GuidanceOptions): Denoiser {
  const { velocity, shape, cfg, skipLayer, steps, shift = DEFAULT_SHIFT, signal } = options;
  if (!Number.isFinite(cfg)) throw new MmditxError('bad-option', `The guidance scale is ${cfg}; it must be a number.`);
  const isActive = skipLayer ? skipLayerWindow(skipLayer, steps, shift) : () => false;
  let calls = 0;

  return async (latent, sigma) => {
    const skipping = isActive(calls++, sigma);
    const passes: Pass[] = ['positive'];
    if (cfg !== 1) passes.push('negative');
    if (skipping) passes.push('positive-skipping-layers');
    const predictions = await velocity({
      latent: floats(shape, latent),
      sigma,
      passes,
      skipLayers: skipping ? skipLayer!.layers : [],
      ...(signal && { signal }),
    });
    const predicted = (pass: Pass) => predictions[passes.indexOf(pass)]?.data;

    const positive = predicted('positive')!;
    const negative = predicted('negative') ?? positive;
    const skipped = predicted('positive-skipping-layers') ?? positive;
    const scale = skipLayer?.scale ?? 0;
    const denoised = new Float32Array(latent.length);
    let sum = 0;
    for (let i = 0; i < denoised.length; i++) {
      const v = negative[i]! + cfg * (positive[i]! - negative[i]!) + scale * (positive[i]! - skipped[i]!);
      denoised[i] = latent[i]! - sigma * v;
      sum += denoised[i]!;
    }
    // One infinity or NaN is enough to make the sum one.
    if (!Number.isFinite(sum)) {
      throw new MmditxError(
        'not-finite',
        `The model's prediction at sigma ${sigma} is not finite; try a higher precision.`,
      );
    }
    return denoised;
  };
}

/** Whether skip-layer guidance acts in the n-th call (from 0) at a sigma. */
function skipLayerWindow(
  { layers, scale, start, end, rule }: SkipLayerGuidance,
  steps: number,
  shift: number,
): (call: number, sigma: number) => boolean {
  if (!layers.every((layer) => Number.isInteger(layer) && layer >= 0)) {
    throw new MmditxError(
      'bad-option',
      `The layers to skip are ${layers.join(', ')}; they must be block indices from 0.`,
    );
  }
  if (!(Number.isFinite(scale) && scale >= 0)) {
    throw new MmditxError('bad-option', `The skip-layer scale is ${scale}; it must be 0 or more.`);
  }
  if (!(start >= 0 && start <= end && end <= 1)) {
    throw new MmditxError(
      'bad-option',
      `The skip-layer window is ${start} to ${end}; it must lie within 0 to 1, the start first.`,
    );
  }
  if (scale === 0 || layers.length === 0) return () => false;
  if (rule === 'steps') return (call) => start * steps < call && call < end * steps;
  const [highest, lowest] = [percentToSigma(start, shift), percentToSigma(end, shift)];
  return (_call, sigma) => lowest <= sigma && sigma <= highest;
}
