/** Learning rates over the steps of a stage, equal to those of diffusers' `get_scheduler` and of kohya's trainer. */
import { MmditxError } from '../errors.ts';

export const learningRateSchedules = ['constant', 'linear', 'cosine', 'polynomial'] as const;

export type LearningRateSchedule = (typeof learningRateSchedules)[number];

/**
 * In diffusers' names: 'constant' with a warm-up is `constant_with_warmup` (its `constant` ignores the warm-up: set
 * that to 0), 'cosine' with more than one cycle is `cosine_with_restarts`, and an end above 0 is kohya's
 * `cosine_with_min_lr` (`lr_scheduler_min_lr_ratio`). diffusers ends `polynomial` at 1e-7, which is an end of
 * 1e-7 / peak.
 */
export interface LearningRateOptions {
  /** Highest learning rate, above 0. */
  readonly peak: number;
  /** How it falls after the warm-up (default 'constant', not at all). */
  readonly schedule?: LearningRateSchedule;
  /** Steps in which it rises linearly from 0 to the peak (default 0). */
  readonly warmup?: number;
  /** Share of the peak that is left after the last step, 0 to 1 (default 0); without meaning for 'constant'. */
  readonly end?: number;
  /** Times the cosine falls, each time from the peak, a whole number (default 1). */
  readonly cycles?: number;
  /** Exponent of 'polynomial', above 0 (default 1, which is 'linear'). */
  readonly power?: number;
}

/**
 * The learning rate as a function of the steps taken so far: 0 gives that of the first step, which is 0 with a
 * warm-up, as in PyTorch's schedulers. From `steps` on it stays at its end.
 * @param steps in all, those of the warm-up included
 * @throws MmditxError `bad-option` for options out of range
 */
export function learningRate(options: LearningRateOptions, steps: number): (step: number) => number {
  const { peak, schedule = 'constant', warmup = 0, end = 0, cycles = 1, power = 1 } = options;
  check(Number.isFinite(peak) && peak > 0, 'learning rate', peak, 'a number above 0');
  check(Number.isSafeInteger(warmup) && warmup >= 0, 'warm-up of the learning rate', warmup, 'a whole number of steps');
  check(end >= 0 && end <= 1, 'end of the learning rate', end, 'a share of its peak, 0 to 1');
  check(Number.isSafeInteger(cycles) && cycles > 0, 'number of cycles', cycles, 'a whole number above 0');
  check(Number.isFinite(power) && power > 0, 'power of the learning rate', power, 'a number above 0');
  check(Number.isSafeInteger(steps) && steps >= 0, 'number of steps', steps, 'a whole number');

  return (step) => {
    if (step < warmup) return (peak * step) / warmup;
    if (schedule === 'constant') return peak;
    const progress = step < steps ? (step - warmup) / (steps - warmup) : 1;
    return peak * (end + (1 - end) * shareLeft(schedule, progress, cycles, power));
  };
}

/** What is left of the way from the peak to the end, 1 to 0, after a share of the steps. */
function shareLeft(
  schedule: Exclude<LearningRateSchedule, 'constant'>,
  progress: number,
  cycles: number,
  power: number,
): number {
  switch (schedule) {
    case 'linear':
      return 1 - progress;
    case 'cosine':
      return progress < 1 ? (1 + Math.cos(Math.PI * ((cycles * progress) % 1))) / 2 : 0;
    case 'polynomial':
      return (1 - progress) ** power;
  }
}

function check(valid: boolean, name: string, value: number, range: string): void {
  if (!valid) throw new MmditxError('bad-option', `The ${name} is ${value}; give ${range}.`);
}
