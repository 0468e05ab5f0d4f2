/**
 * Which noise levels a step trains on, and how much each of them counts. Sigma is the share of noise in
 * `(1 - sigma) * latent + sigma * noise`: 0 is the clean end, 1 the noisy end. The paper calls it t.
 */
import { MmditxError } from '../errors.ts';
import type { TorchGenerator } from '../sampling/noise.ts';
import { resolutionShift, shiftedSigma } from '../sampling/schedules.ts';

/** How often each noise level is drawn, before it is shifted (SD3 paper, arXiv 2403.03206, section 3.1). */
export type SigmaDensity =
  /** sigmoid(mean + std * z), z standard normal. Defaults 0 and 1, the paper's best; a higher mean means more noise. */
  | { readonly kind: 'logit-normal'; readonly mean?: number; readonly std?: number }
  /** Favours the middle for a positive scale, both ends for a negative one; -1 to 2 / (pi - 2), default 1.29. */
  | { readonly kind: 'mode'; readonly scale?: number }
  /** Density 2 / (pi - 2 pi t + 2 pi t^2). The trainers' `cosmap` is not this but a weight: see {@link LossWeighting}. */
  | { readonly kind: 'cosmap' }
  | { readonly kind: 'uniform' };

/** The paper's density of lowest average rank, and the scale it recommends for `mode`. */
export const DEFAULT_DENSITY: SigmaDensity = { kind: 'logit-normal', mean: 0, std: 1 };
export const DEFAULT_MODE_SCALE = 1.29;

/** Beyond these, `mode` no longer rises with its argument (SD3 paper, section 3.1). */
const MODE_SCALES = [-1, 2 / (Math.PI - 2)] as const;

/** The shift of noise levels for larger pictures, which need more noise to hide as much (SD3 paper, section 5.3.2). */
export type TrainingShift =
  /** kohya's `training_shift`; 1 shifts nothing. 3 is the paper's choice at 1024x1024. */
  | { readonly kind: 'fixed'; readonly shift: number }
  /** `baseShift * sqrt(tokens / baseTokens)`; baseShift (default 1) is right for pictures of baseTokens patches. */
  | { readonly kind: 'resolution'; readonly baseTokens: number; readonly baseShift?: number };

export interface SigmaOptions {
  /** Shift of the drawn levels (default 1, none): see {@link trainingShift}. */
  readonly shift?: number;
  /**
   * Lowest and highest level (defaults 0 and 1). The whole density is squeezed between them after the shift, as by
   * kohya's `min_timestep` and `max_timestep`, which are 1000 times these.
   */
  readonly min?: number;
  readonly max?: number;
  /**
   * Which end the density counts from (default 'clean', as in the paper and kohya's trainer). diffusers' scripts use
   * the draw as an index into timesteps that fall from 1000: they count from the 'noisy' end, and sigma is one minus
   * the draw, before the shift. Every density but 'logit-normal' with a mean other than 0 is symmetric and so the same
   * from both ends; a mean of m from one end is a mean of -m from the other.
   */
  readonly countedFrom?: 'clean' | 'noisy';
}

/**
 * Draws noise levels of one step: one draw from the generator per level, normal for 'logit-normal', else uniform.
 * Levels are continuous. kohya's and diffusers' trainers round them down to whole thousandths, for which the model has
 * no use: its timestep is a real number.
 * @returns [count] values from 0 to 1
 * @throws MmditxError `bad-option` for a density, shift or bounds out of range
 */
export function drawSigmas(
  density: SigmaDensity,
  count: number,
  random: TorchGenerator,
  options: SigmaOptions = {},
): Float32Array {
  checkDensity(density);
  checkSigmaOptions(options);
  const { shift = 1, min = 0, max = 1, countedFrom = 'clean' } = options;
  const draws = density.kind === 'logit-normal' ? random.normal(count) : random.uniform(count);
  return draws.map((draw) => {
    const level = densityLevel(density, draw);
    const time = countedFrom === 'noisy' ? 1 - level : level;
    return min + (max - min) * shiftedSigma(time, shift);
  });
}

/**
 * The level that a random number stands for: a standard normal one for 'logit-normal', else one from 0 to 1.
 * The formulas are the paper's (section 3.1); those of logit-normal and mode are also diffusers' and kohya's.
 */
export function densityLevel(density: SigmaDensity, draw: number): number {
  switch (density.kind) {
    case 'logit-normal': {
      const { mean = 0, std = 1 } = density;
      return 1 / (1 + Math.exp(-(mean + std * draw)));
    }
    case 'mode': {
      const { scale = DEFAULT_MODE_SCALE } = density;
      return 1 - draw - scale * (Math.cos((Math.PI / 2) * draw) ** 2 - 1 + draw);
    }
    case 'cosmap':
      return 1 - 1 / (Math.tan((Math.PI / 2) * draw) + 1);
    case 'uniform':
      return draw;
  }
}

/**
 * The shift for pictures of a size.
 * @param tokens patches of the picture: (height / 16) * (width / 16) in pixels for Stable Diffusion 3.5
 * @throws MmditxError `bad-option` for a shift or base out of range
 */
export function trainingShift(shift: TrainingShift, tokens: number): number {
  if (shift.kind === 'fixed') return positive('training shift', shift.shift);
  const { baseTokens, baseShift = 1 } = shift;
  const base = positive('base of the training shift in tokens', baseTokens);
  return positive('training shift at the base', baseShift) * resolutionShift(tokens, base);
}

/**
 * How much an item counts in the loss on velocities, `mean((v - (noise - latent))^2)`, by its noise level.
 *
 * The paper, and this package, weigh every level equally. Trainers in use start from another loss, the "preconditioned"
 * one on the denoised latent, `mean((-sigma v + noisy - latent)^2)`, which is sigma^2 times the loss on velocities, and
 * multiply it with the weight of a scheme. So their options mean, as weights on the velocity loss:
 *
 * | trainer                                      | none, uniform, logit_normal, mode | sigma_sqrt | cosmap    |
 * | -------------------------------------------- | --------------------------------- | ---------- | --------- |
 * | paper                                        | 1                                 |            |           |
 * | diffusers with `precondition_outputs=0`      | 1                                 | sigma^-2   | c         |
 * | diffusers as it comes, and kohya's (always)  | sigma^2                           | 1          | sigma^2 c |
 *
 * with c = 2 / (pi (1 - 2 sigma + 2 sigma^2)). To repeat one of them set `kind` to the scheme (logit_normal and mode
 * have the weight 'none' and belong in {@link SigmaDensity}; with cosmap and sigma_sqrt these trainers draw levels
 * uniformly) and `preconditioned` as the row says.
 */
export interface LossWeighting {
  readonly kind: 'none' | 'sigma_sqrt' | 'cosmap';
  /** Multiplies the weight with sigma^2 (default false). */
  readonly preconditioned?: boolean;
}

/**
 * The weight of each item of a batch on the velocity loss: see {@link LossWeighting}.
 * @throws MmditxError `bad-option` where 'sigma_sqrt' without preconditioning meets a level of 0, at which it is infinite
 */
export function lossWeights(weighting: LossWeighting, sigmas: Float32Array): Float32Array {
  return sigmas.map((sigma) => lossWeight(weighting, sigma));
}

function lossWeight({ kind, preconditioned = false }: LossWeighting, sigma: number): number {
  const factor = preconditioned ? sigma ** 2 : 1;
  switch (kind) {
    case 'none':
      return factor;
    case 'sigma_sqrt':
      if (preconditioned) return 1;
      if (sigma > 0) return sigma ** -2;
      throw new MmditxError(
        'bad-option',
        'The loss weighting sigma_sqrt is infinite without noise; set the lowest noise level above 0, or precondition the loss.',
      );
    case 'cosmap':
      return (factor * 2) / (Math.PI * (1 - 2 * sigma + 2 * sigma ** 2));
  }
}

/** Noise levels at which the SD3 paper computes the validation loss. */
const VALIDATION_LEVELS = 8;

/** Equidistant noise levels 1 / count to 1, for the validation loss. */
export function validationSigmas(count: number = VALIDATION_LEVELS): Float32Array {
  return Float32Array.from({ length: count }, (_, i) => (i + 1) / count);
}

/**
 * The validation loss, a number that goes with people's preference: the mean over all levels but 1, where there is
 * nothing but noise to see (SD3 paper). NaN without a level below 1.
 */
export function validationMean(losses: readonly { readonly sigma: number; readonly loss: number }[]): number {
  const counted = losses.filter(({ sigma }) => sigma < 1);
  return counted.reduce((sum, { loss }) => sum + loss, 0) / counted.length;
}

function checkDensity(density: SigmaDensity): void {
  switch (density.kind) {
    case 'logit-normal': {
      const { mean = 0, std = 1 } = density;
      if (!Number.isFinite(mean)) throw refuse('mean of the logit-normal noise levels', mean, 'a number');
      positive('standard deviation of the logit-normal noise levels', std);
      return;
    }
    case 'mode': {
      const { scale = DEFAULT_MODE_SCALE } = density;
      const [least, most] = MODE_SCALES;
      if (!(scale >= least && scale <= most)) {
        throw refuse('scale of the mode noise levels', scale, `a number from ${least} to ${most.toFixed(3)}`);
      }
    }
  }
}

function checkSigmaOptions({ shift = 1, min = 0, max = 1 }: SigmaOptions): void {
  positive('training shift', shift);
  if (!(min >= 0 && min <= max && max <= 1)) {
    throw new MmditxError(
      'bad-option',
      `The noise levels ${min} to ${max} are no range; give a lowest and a highest level, 0 to 1.`,
    );
  }
}

function positive(name: string, value: number): number {
  if (!(value > 0 && value < Number.POSITIVE_INFINITY)) throw refuse(name, value, 'a number above 0');
  return value;
}

function refuse(name: string, value: number, range: string): MmditxError {
  return new MmditxError('bad-option', `The ${name} is ${value}; give ${range}.`);
}
