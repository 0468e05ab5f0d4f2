/** The README's main job, from the command to the picture: seconds and peak memory, cold and warm. */

import { execFileSync } from 'node:child_process';
import { existsSync, statSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { SMALL, withTemporaryFolder } from './models.ts';
import { MIB, median, publish, QUICK, ROOT, range, rounded, runNode } from './support.ts';

const PROGRAM = 'dist/cli/main.js';
const JOB = ['generate', '3d fox on a teal background', '--seed', '1'];
const WARM_RUNS = QUICK ? 1 : 5;

if (!existsSync(join(ROOT, PROGRAM))) {
  console.log(`Main job: not measured, ${PROGRAM} is not there; run "npm run build" first.`);
} else if (!SMALL) {
  console.log('Main job: not measured, the small model is not there; models/small/README.md says how to train it.');
} else {
  const cold = !QUICK && emptyPageCache();
  const runs = await withTemporaryFolder(async (folder) => {
    const output = join(folder, 'fox.png');
    const reports = [];
    for (let run = 0; run <= WARM_RUNS; run++) {
      reports.push(await runNode([PROGRAM, ...JOB, '--output', output]));
      if (!statSync(output).size) throw new Error('The main job made no picture.');
    }
    return reports;
  });
  const [first, ...warm] = runs as [(typeof runs)[0], ...typeof runs];
  const seconds = warm.map((report) => report.seconds);
  await publish({
    title: 'The main job, whole process',
    rows: [
      {
        run: cold ? 'cold (page cache emptied)' : 'first',
        seconds: rounded(first.seconds),
        'from, to': '',
        'peak memory, MiB': Math.round(first.peakBytes / MIB),
      },
      {
        run: `warm (median of ${WARM_RUNS})`,
        seconds: rounded(median(seconds)),
        'from, to': range(seconds),
        'peak memory, MiB': Math.round(median(warm.map((report) => report.peakBytes)) / MIB),
      },
    ],
    settings: { job: `mmditx ${JOB.map((word) => (word.includes(' ') ? `"${word}"` : word)).join(' ')}` },
  });
}

/** Makes the system forget files it has read; only root on Linux may. False where it is not possible. */
function emptyPageCache(): boolean {
  try {
    execFileSync('sync');
    writeFileSync('/proc/sys/vm/drop_caches', '3');
    return true;
  } catch {
    return false;
  }
}
