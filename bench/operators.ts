/** ONNX Runtime's own profile of a program, by operator. */

import { readdir, readFile } from 'node:fs/promises';
import { join } from 'node:path';
import { nodeRuntime } from '../src/runtime/node.node.ts';
import type { Runtime } from '../src/runtime/runtime.ts';
import { withTemporaryFolder } from './models.ts';
import { THREADS } from './support.ts';

/** An event of ONNX Runtime's trace, times in microseconds. */
interface TraceEvent {
  readonly cat: string;
  readonly name: string;
  readonly ts: number;
  readonly dur: number;
  readonly args?: { readonly op_name?: string };
}

export interface OperatorTime {
  readonly operator: string;
  readonly calls: number;
  readonly microseconds: number;
}

/** A runtime whose programs write their profile to files that start with `prefix`. */
function profiled(prefix: string): Runtime {
  const runtime = nodeRuntime({ threads: THREADS });
  return { ...runtime, compile: (program, options) => runtime.compile(program, { ...options, profile: prefix }) };
}

/** Time in each operator over all runs but the first, longest first, and the time of the runs as a whole. */
function operatorTimes(trace: readonly TraceEvent[]): { operators: OperatorTime[]; total: number } {
  const runs = trace.filter(({ cat, name }) => cat === 'Session' && name === 'model_run').sort((a, b) => a.ts - b.ts);
  const counted = runs.slice(1);
  const start = counted[0]!.ts;
  const times = new Map<string, { calls: number; microseconds: number }>();
  for (const { cat, name, ts, dur, args } of trace) {
    if (cat !== 'Node' || !name.endsWith('_kernel_time') || ts < start) continue;
    const entry = times.get(args!.op_name!) ?? { calls: 0, microseconds: 0 };
    times.set(args!.op_name!, { calls: entry.calls + 1, microseconds: entry.microseconds + dur });
  }
  const operators = [...times].map(([operator, entry]) => ({ operator, ...entry }));
  return {
    operators: operators.sort((a, b) => b.microseconds - a.microseconds),
    total: counted.reduce((sum, { dur }) => sum + dur, 0),
  };
}

async function readTrace(folder: string): Promise<TraceEvent[]> {
  const [file] = (await readdir(folder)).filter((name) => name.endsWith('.json'));
  if (!file) throw new Error('ONNX Runtime wrote no profile.');
  return JSON.parse(await readFile(join(folder, file), 'utf8')) as TraceEvent[];
}

/** Something that is loaded with a runtime, run several times and disposed of. */
export interface Subject {
  call(): Promise<unknown>;
  dispose(): Promise<void>;
}

/** Time in each operator over `runs` runs, longest first, and of the runs as a whole; one run before them does not count. */
export async function profileOperators(
  load: (runtime: Runtime) => Subject,
  runs: number,
): Promise<{ operators: OperatorTime[]; total: number }> {
  return withTemporaryFolder(async (folder) => {
    const { call, dispose } = load(profiled(join(folder, 'profile')));
    for (let run = 0; run <= runs; run++) await call();
    await dispose();
    return operatorTimes(await readTrace(folder));
  });
}
