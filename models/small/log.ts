/** Progress of a training stage, a line now and then. */

import type { StepReport } from '../../src/training/trainer.ts';

/** Prints means over the last `every` steps with the time left. */
export function progressLog(
  name: string,
  steps: number,
  every = Number(process.env.LOG_EVERY ?? 100),
): (report: StepReport) => void {
  let sums: Record<string, number> = {};
  let count = 0;
  let since = Date.now();
  return ({ step, loss, norm, metrics }) => {
    for (const [key, value] of Object.entries({ loss, norm, ...metrics })) sums[key] = (sums[key] ?? 0) + value;
    count++;
    if (step % every !== 0 && step !== steps) return;
    const seconds = (Date.now() - since) / 1000 / count;
    const means = Object.entries(sums).map(([key, sum]) => `${key} ${(sum / count).toFixed(4)}`);
    const left = Math.round(((steps - step) * seconds) / 60);
    console.log(`${name} ${step}/${steps}  ${means.join('  ')}  ${seconds.toFixed(3)} s/step  ${left} min left`);
    sums = {};
    count = 0;
    since = Date.now();
  };
}
