/**
 * Noise levels. A rectified flow mixes an image latent with noise, `x = (1 - sigma) * x0 + sigma * noise`; a schedule
 * is the falling sequence of sigmas, 1 to 0, at which a sampler evaluates the model.
 *
 * The model was trained on 1000 noise levels t = 0.001, 0.002, .. 1 that are shifted towards noise ("Scaling Rectified
 * Flow Transformers", arXiv 2403.03206, section 5.3.2). Schedules are named and computed as in ComfyUI, whose `normal`
 * is also what Stability's reference code and diffusers use.
 */
import { MmditxError } from '../errors.ts';

/** The timestep shift of every Stable Diffusion 3.5 model, at any image size (arXiv 2403.03206, section 5.3.2). */
export const DEFAULT_SHIFT = 3;

/** Noise levels in the training table; the model's timestep input is sigma times this. */
export const TRAINING_TIMESTEPS = 1000;

/** More steps than this are refused: ComfyUI's limit, ten times the training table. */
export const MAX_STEPS = 10_000;

/** Shapes of the Karras and beta curves, the same in ComfyUI and diffusers. */
const KARRAS_RHO = 7;
const BETA_SHAPE = 0.6;

/** `linear_quadratic` spends its first half of the steps on this share of the noise. */
const LINEAR_QUADRATIC_THRESHOLD = 0.025;

export const scheduleNames = [
  'normal',
  'simple',
  'sgm_uniform',
  'ddim_uniform',
  'beta',
  'karras',
  'exponential',
  'linear_quadratic',
  'kl_optimal',
] as const;

export type ScheduleName = (typeof scheduleNames)[number];

export interface ScheduleOptions {
  /** Timestep shift, above 0; default 3. */
  readonly shift?: number;
}

/**
 * The sigmas of a named schedule, falling, the last one 0.
 *
 * There are `steps + 1` of them, with ComfyUI's two exceptions: `ddim_uniform` takes every k-th level of the training
 * table, which can give more than was asked for, and `beta` drops levels that repeat, which gives fewer when `steps`
 * comes near 1000.
 *
 * @param steps whole number from 1 to 10000
 * @throws MmditxError `bad-option` for steps or a shift out of range
 */
export function scheduleSigmas(schedule: ScheduleName, steps: number, options: ScheduleOptions = {}): Float32Array {
  const shift = options.shift ?? DEFAULT_SHIFT;
  checkSteps(steps);
  checkShift(shift);
  if (!scheduleNames.includes(schedule)) {
    throw new MmditxError(
      'bad-option',
      `There is no schedule "${schedule}"; choose one of ${scheduleNames.join(', ')}.`,
    );
  }
  return Float32Array.from([...levels(schedule, steps, shift), 0]);
}

/** A schedule without its final 0. */
function levels(schedule: ScheduleName, steps: number, shift: number): number[] {
  const table = sigmaTable(shift);
  const [sigmaMin, sigmaMax] = [table[0]!, table[TRAINING_TIMESTEPS - 1]!];
  const levelOf = (time: number) => float32ShiftedSigma(time / TRAINING_TIMESTEPS, shift);
  switch (schedule) {
    case 'normal':
      // The ends are already shifted sigmas and are shifted again here: the references' way, kept because it is theirs.
      return float32Linspace(timestep(sigmaMax), timestep(sigmaMin), steps).map(levelOf);
    case 'sgm_uniform':
      return float32Linspace(timestep(sigmaMax), timestep(sigmaMin), steps + 1)
        .slice(0, steps)
        .map(levelOf);
    case 'simple': {
      const stride = TRAINING_TIMESTEPS / steps;
      return Array.from({ length: steps }, (_, i) => table[TRAINING_TIMESTEPS - 1 - Math.trunc(i * stride)]!);
    }
    case 'ddim_uniform': {
      const stride = Math.max(Math.floor(TRAINING_TIMESTEPS / steps), 1);
      const taken = [];
      for (let i = 1; i < TRAINING_TIMESTEPS; i += stride) taken.push(table[i]!);
      return taken.reverse();
    }
    case 'beta': {
      const indices = Array.from({ length: steps }, (_, i) =>
        roundHalfToEven(betaQuantile(1 - i / steps) * (TRAINING_TIMESTEPS - 1)),
      );
      return indices.filter((index, i) => index !== indices[i - 1]).map((index) => table[index]!);
    }
    case 'karras':
      return karrasCurve(sigmaMax, sigmaMin, steps);
    case 'exponential':
      return exponentialCurve(sigmaMax, sigmaMin, steps);
    case 'linear_quadratic':
      return linearQuadratic(steps).map((sigma) => sigma * sigmaMax);
    case 'kl_optimal':
      // Sabour et al., "Align Your Steps" (arXiv 2404.14507): equal steps in arctan(sigma).
      return linspace(Math.atan(sigmaMax), Math.atan(sigmaMin), steps).map(Math.tan);
  }
}

/**
 * The noise level of a training time t in [0, 1]: `shift * t / (1 + (shift - 1) * t)` (arXiv 2403.03206, eq. 23).
 * The other direction is not this function's inverse: see `timestep`.
 */
export function shiftedSigma(t: number, shift: number = DEFAULT_SHIFT): number {
  return (shift * t) / (1 + (shift - 1) * t);
}

/**
 * `shiftedSigma` with every operation rounded to float32, as the references compute it. Its last bit matters: a sigma
 * can lie exactly on the inclusive edge of ComfyUI's skip-layer window.
 */
function float32ShiftedSigma(t: number, shift: number): number {
  const { fround } = Math;
  const time = fround(t);
  return fround(fround(shift * time) / fround(1 + fround((shift - 1) * time)));
}

/** The 1000 noise levels of the training table, rising; entry i belongs to t = (i + 1) / 1000. */
export function sigmaTable(shift: number = DEFAULT_SHIFT): Float32Array {
  return Float32Array.from({ length: TRAINING_TIMESTEPS }, (_, i) =>
    float32ShiftedSigma((i + 1) / TRAINING_TIMESTEPS, shift),
  );
}

/** The timestep handed to the model for a sigma: `1000 * sigma`, not rounded. Sigma is already shifted. */
export function timestep(sigma: number): number {
  return TRAINING_TIMESTEPS * sigma;
}

/**
 * The sigma at a share of the way from noise (0) to image (1), as ComfyUI converts percentages, for instance those of
 * the skip-layer window. Shares outside 0..1 give the nearest end.
 */
export function percentToSigma(percent: number, shift: number = DEFAULT_SHIFT): number {
  return shiftedSigma(1 - Math.min(Math.max(percent, 0), 1), shift);
}

/**
 * The shift that keeps the uncertainty of a noise level equal when `pixels` differs from the `basePixels` at which no
 * shift is needed: `sqrt(pixels / basePixels)` (arXiv 2403.03206, section 5.3.2).
 * Stable Diffusion 3.5 itself uses `DEFAULT_SHIFT` at every size.
 */
export function resolutionShift(pixels: number, basePixels: number): number {
  return Math.sqrt(pixels / basePixels);
}

export interface DynamicShiftOptions {
  /** Image tokens that get `baseMu`; default 256. */
  readonly baseTokens?: number;
  /** Image tokens that get `maxMu`; default 4096. */
  readonly maxTokens?: number;
  /** Default 0.5. */
  readonly baseMu?: number;
  /** Default 1.15. */
  readonly maxMu?: number;
}

/**
 * The timestep shift for a picture of `imageTokens` patches when it is to grow with the picture: exp(mu), with mu on
 * the straight line through the two given points (diffusers' `use_dynamic_shifting`; its names for the options are
 * `base_image_seq_len`, `max_image_seq_len`, `base_shift` and `max_shift`, with the same defaults).
 */
export function dynamicShift(imageTokens: number, options: DynamicShiftOptions = {}): number {
  const { baseTokens = 256, maxTokens = 4096, baseMu = 0.5, maxMu = 1.15 } = options;
  const slope = (maxMu - baseMu) / (maxTokens - baseTokens);
  return Math.exp(baseMu + slope * (imageTokens - baseTokens));
}

export interface DiffusersScheduleOptions {
  /** Fixed timestep shift, above 0; default 3. Contradicts `imageTokens`. */
  readonly shift?: number;
  /** Shift by the size of the picture instead (`use_dynamic_shifting`): (height / 16) * (width / 16). */
  readonly imageTokens?: number;
  /** The line that turns `imageTokens` into a shift. */
  readonly dynamic?: DynamicShiftOptions;
  /** Respace the sigmas between their two ends (`use_karras_sigmas` and its siblings); default: leave them. */
  readonly curve?: 'karras' | 'exponential' | 'beta';
}

/**
 * The sigmas of diffusers' `FlowMatchEulerDiscreteScheduler`: `steps + 1` values, the last one 0.
 * Without options they equal the schedule `normal`, but for the last bits.
 *
 * @throws MmditxError `bad-option` for steps or a shift out of range, or for both `shift` and `imageTokens`
 */
export function diffusersSigmas(steps: number, options: DiffusersScheduleOptions = {}): Float32Array {
  const { imageTokens, dynamic, curve } = options;
  checkSteps(steps);
  if (imageTokens !== undefined && options.shift !== undefined) {
    throw new MmditxError('bad-option', 'Give either a fixed shift or the number of image tokens, not both.');
  }
  const shift = imageTokens === undefined ? (options.shift ?? DEFAULT_SHIFT) : dynamicShift(imageTokens, dynamic);
  checkShift(shift);
  // A dynamic shift is applied once, to the unshifted range; a fixed one again to an already shifted range.
  const lowest = imageTokens === undefined ? shiftedSigma(1 / TRAINING_TIMESTEPS, shift) : 1 / TRAINING_TIMESTEPS;
  const shifted = linspace(1, lowest, steps).map((t) => shiftedSigma(t, shift));
  const [first, last] = [shifted[0]!, shifted[steps - 1]!];
  const curves = {
    none: () => shifted,
    karras: () => karrasCurve(first, last, steps),
    exponential: () => exponentialCurve(first, last, steps),
    beta: () => linspace(1, 0, steps).map((share) => last + betaQuantile(share) * (first - last)),
  };
  return Float32Array.from([...curves[curve ?? 'none'](), 0]);
}

/** How `denoise` shortens a schedule that starts from an image; see `partialSigmas`. */
export type DenoiseRule = 'stability' | 'comfyui' | 'diffusers';

/**
 * The part of a schedule that redraws an existing image: the caller starts from
 * `sigma * noise + (1 - sigma) * image` at the first sigma returned.
 *
 * - `stability`: `steps` are planned and the first `trunc(steps * (1 - denoise))` left out;
 * - `diffusers`: the same but for rounding, as its img2img pipeline computes it from `strength`;
 * - `comfyui`: `trunc(steps / denoise)` are planned and only the last `steps` of them run.
 *
 * @param schedule gives the whole schedule for a number of steps, e.g. `(steps) => scheduleSigmas('normal', steps)`
 * @param denoise share of the image to redraw, above 0 and at most 1; 1 gives the whole schedule
 * @throws MmditxError `bad-option` for steps or denoise out of range
 */
export function partialSigmas(
  schedule: (steps: number) => Float32Array,
  steps: number,
  denoise: number,
  rule: DenoiseRule,
): Float32Array {
  checkSteps(steps);
  if (!(denoise > 0 && denoise <= 1)) {
    throw new MmditxError('bad-option', `Denoise is ${denoise}; it must be above 0 and at most 1.`);
  }
  switch (rule) {
    case 'stability':
      return schedule(steps).subarray(Math.trunc(steps * (1 - denoise)));
    case 'diffusers':
      return schedule(steps).subarray(Math.trunc(Math.max(steps - Math.min(steps * denoise, steps), 0)));
    case 'comfyui': {
      const planned = Math.trunc(steps / denoise);
      if (planned > MAX_STEPS) {
        throw new MmditxError(
          'bad-option',
          `${steps} steps at a denoise of ${denoise} need a schedule of ${planned} steps, more than ${MAX_STEPS}; raise denoise.`,
        );
      }
      return schedule(planned).slice(-(steps + 1));
    }
  }
}

/** Karras et al. (arXiv 2206.00364), eq. 5: equal steps in the rho-th root of sigma. */
function karrasCurve(from: number, to: number, steps: number): number[] {
  return linspace(from ** (1 / KARRAS_RHO), to ** (1 / KARRAS_RHO), steps).map((root) => root ** KARRAS_RHO);
}

/** Equal steps in log(sigma). */
function exponentialCurve(from: number, to: number, steps: number): number[] {
  return linspace(Math.log(from), Math.log(to), steps).map(Math.exp);
}

/**
 * Half of the steps at an even, small noise distance, then a parabola that joins with the same slope and ends at 0
 * (Polyak et al., "Movie Gen", arXiv 2410.13720). Starts at 1.
 */
function linearQuadratic(steps: number): number[] {
  const linearSteps = Math.floor(steps / 2);
  if (linearSteps === 0) return [1];
  const slope = LINEAR_QUADRATIC_THRESHOLD / linearSteps;
  const quadraticSteps = steps - linearSteps;
  const curvature = (1 - LINEAR_QUADRATIC_THRESHOLD - slope * quadraticSteps) / quadraticSteps ** 2;
  return Array.from({ length: steps }, (_, i) => {
    const beyond = Math.max(i - linearSteps, 0);
    return 1 - (slope * i + curvature * beyond ** 2);
  });
}

/** `count` evenly spaced numbers from `from` to `to`, both included; a single one is `from`. */
function linspace(from: number, to: number, count: number): number[] {
  const step = count > 1 ? (to - from) / (count - 1) : 0;
  return Array.from({ length: count }, (_, i) => (i > 0 && i === count - 1 ? to : from + i * step));
}

/** `linspace` as PyTorch computes it in float32: each half counted from its own end. */
function float32Linspace(from: number, to: number, count: number): number[] {
  const { fround } = Math;
  const [first, last] = [fround(from), fround(to)];
  const step = count > 1 ? fround(fround(last - first) / (count - 1)) : 0;
  return Array.from({ length: count }, (_, i) =>
    fround(i < count / 2 ? first + i * step : last - (count - 1 - i) * step),
  );
}

/** The quantile function of the Beta(0.6, 0.6) distribution: the x in 0..1 with a share `p` of its mass below. */
function betaQuantile(p: number): number {
  // The distribution is symmetric; its lower half is where the series below converges quickly.
  if (p > 0.5) return 1 - betaQuantile(1 - p);
  // Exactly, not to the last bit: half of the table is a tie in rounding, which must go the references' way.
  if (p === 0.5) return 0.5;
  if (p <= 0) return 0;
  let [low, high] = [0, 0.5];
  const target = p * 2 * betaMassBelow(0.5);
  // 2^-80 is far finer than a double needs near 0, where the density has its pole.
  for (let i = 0; i < 80; i++) {
    const middle = (low + high) / 2;
    if (betaMassBelow(middle) < target) low = middle;
    else high = middle;
  }
  return (low + high) / 2;
}

/**
 * The integral of (u (1 - u))^(a - 1) from 0 to x, for a = 0.6 and x at most 1/2: the incomplete beta function, by
 * expanding (1 - u)^(a - 1) into its binomial series.
 */
function betaMassBelow(x: number): number {
  let coefficient = 1;
  let sum = 0;
  for (let n = 0; coefficient > 1e-18; n++) {
    sum += coefficient / (n + BETA_SHAPE);
    coefficient *= ((n + 1 - BETA_SHAPE) / (n + 1)) * x;
  }
  return x ** BETA_SHAPE * sum;
}

/** Rounds as NumPy's `rint` does. */
function roundHalfToEven(value: number): number {
  const below = Math.floor(value);
  return value - below === 0.5 ? below + (below % 2) : Math.round(value);
}

function checkSteps(steps: number): void {
  if (!(Number.isInteger(steps) && steps >= 1 && steps <= MAX_STEPS)) {
    throw new MmditxError(
      'bad-option',
      `The number of steps is ${steps}; it must be a whole number from 1 to ${MAX_STEPS}.`,
    );
  }
}

function checkShift(shift: number): void {
  if (!(Number.isFinite(shift) && shift > 0)) {
    throw new MmditxError(
      'bad-option',
      `The shift is ${shift}; it must be a number above 0, such as ${DEFAULT_SHIFT}.`,
    );
  }
}
