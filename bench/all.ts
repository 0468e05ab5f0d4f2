/** All measurements, one after the other. */

import { spawnSync } from 'node:child_process';
import { join } from 'node:path';
import { ROOT } from './support.ts';

const SCRIPTS = [
  'main-job',
  'parts',
  'transformer-vs-pytorch',
  'training-step-vs-pytorch',
  'precision',
  'step-cache',
  'profile',
];

for (const script of SCRIPTS) {
  const path = join(ROOT, 'bench', `${script}.ts`);
  const { status } = spawnSync(process.execPath, [...process.execArgv, path], { stdio: 'inherit' });
  if (status !== 0) process.exitCode = 1;
}
