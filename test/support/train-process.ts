/** Trains as a configuration file says, in a process that a test may kill. */

import { train } from '../../src/training/train.node.ts';
import { cpu } from './run.ts';

await train(process.argv[2]!, { runtime: cpu });
