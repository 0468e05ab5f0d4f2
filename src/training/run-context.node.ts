/** What the parts of a training run share. */

import { fastestRuntime } from '../runtime/fastest.node.ts';
import { nodeRuntime } from '../runtime/node.node.ts';
import type { Runtime } from '../runtime/runtime.ts';
import type { TrainConfig } from './config.ts';
import type { TrainConfigFile } from './config-file.node.ts';
import type { ReadData } from './datasets.node.ts';
import type { Journal } from './journal.node.ts';
import type { TrainEvent } from './log.ts';
import type { RunFolder } from './run-folder.node.ts';

export interface TrainOptions {
  /** Stops between two steps, after saving the state. */
  signal?: AbortSignal | undefined;
  /** Called with everything that the log is told. */
  onEvent?: (event: TrainEvent) => void;
  /** Called once with what was found in the data sets, as text for a terminal. */
  onData?: (text: string) => void;
  /** Called while pictures are read and encoded. */
  onPreparation?: (progress: { readonly what: string; readonly done: number; readonly total: number }) => void;
  /** Runs the networks (default: the configured device, or the fastest). */
  runtime?: Runtime;
}

export interface RunContext extends TrainConfigFile {
  readonly folder: RunFolder;
  readonly runtime: Runtime;
  readonly data: ReadonlyMap<string, ReadData>;
  readonly journal: Journal;
  readonly options: TrainOptions;
}

/** Where a configuration's networks run. */
export async function runtimeOf(config: TrainConfig, { runtime }: TrainOptions): Promise<Runtime> {
  if (runtime) return runtime;
  return config.device
    ? nodeRuntime({ device: config.device, ...threadsOf(config) })
    : fastestRuntime(threadsOf(config));
}

function threadsOf({ threads }: TrainConfig): { threads?: number } {
  return threads === undefined ? {} : { threads };
}
