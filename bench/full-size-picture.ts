/**
 * A whole picture with a checkpoint of full size and random weights, all three encoders, in a process of its own: peak
 * memory, seconds until sampling starts, seconds a step.
 */

import { join } from 'node:path';
import { load } from '../src/index.node.ts';
import { PRECISIONS, type Precision } from '../src/weights/convert.ts';
import { FULL_SIZE_FOLDER, fullSizeFiles } from './full-size.ts';
import { publish, QUICK, type Row, rounded, runNode, THREADS } from './support.ts';

const SIDE = 512;
const STEPS = QUICK ? 1 : 8;
const CACHE = join(FULL_SIZE_FOLDER, 'converted');

interface Report {
  readonly loaded: number;
  readonly sampling: number;
  readonly step: number;
  readonly done: number;
}

const child = process.argv[2] as Precision | undefined;
if (child && PRECISIONS.includes(child)) {
  await draw(child);
} else {
  const rows: Row[] = [];
  for (const precision of QUICK ? (['int8'] as const) : (['int8', 'fp16'] as const)) {
    const args = [import.meta.filename ?? process.argv[1]!, precision];
    // The first run converts where it must, and leaves the files in the system's page cache.
    await runNode(args, { typescript: true });
    const { peakBytes, stdout } = await runNode(args, { typescript: true });
    const { loaded, sampling, step, done } = JSON.parse(stdout.trim().split('\n').at(-1)!) as Report;
    rows.push({
      precision,
      'peak memory, GiB': rounded(peakBytes / 2 ** 30),
      'files opened, s': rounded(loaded),
      'sampling starts, s': rounded(sampling),
      'a step of two passes, s': rounded(step),
      'picture done, s': rounded(done),
    });
  }
  await publish({
    title: `A ${SIDE}x${SIDE} picture in ${STEPS} steps, full size, all three encoders, warm cache (seconds since the process started)`,
    rows,
    settings: { threads: THREADS },
  });
}

/** Draws one picture and writes the times of its stages, in seconds since the process started, as JSON. */
async function draw(precision: Precision): Promise<void> {
  const files = await fullSizeFiles();
  const sd = await load(files, { precision, cacheFolder: CACHE, device: 'cpu', threads: THREADS, release: true });
  const loaded = performance.now();
  const steps: number[] = [];
  let done = 0;
  for await (const event of sd.stream({
    prompt: 'a red fox in the snow',
    width: SIDE,
    height: SIDE,
    steps: STEPS,
    seed: 1,
  })) {
    if (event.type === 'step') steps.push(performance.now());
    if (event.type === 'images') done = performance.now();
  }
  await sd.dispose();
  const step = steps.length > 1 ? (steps.at(-1)! - steps[0]!) / (steps.length - 1) : 0;
  // The first step begins when the encoders are done; the transformer loads within it.
  const report: Report = { loaded, sampling: steps[0]! - step, step, done };
  console.log(JSON.stringify(Object.fromEntries(Object.entries(report).map(([key, ms]) => [key, ms / 1000]))));
}
