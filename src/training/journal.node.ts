/** What a run tells of itself: to the log, the report, and whoever started it. */

import type { StageConfig, TrainConfig } from './config.ts';
import { openTrainLog, type TrainLog, type TrainReporter, trainReporter } from './log.node.ts';
import type { RunPosition, TrainEvent } from './log.ts';
import type { TrainOptions } from './run-context.node.ts';
import type { RunFolder } from './run-folder.node.ts';

/** The log and the report of a run. */
export interface Journal {
  /** Waits until what was emitted is on the disk. */
  flush(): Promise<void>;
  /** What was found in the data sets. */
  describe(data: string): void;
  /** Begins to write, after what happened before a position; what was emitted before follows. Does nothing when it is open. */
  open(at: RunPosition): Promise<void>;
  emit(event: TrainEvent): void;
  note(message: string): void;
  end(reason: 'finished' | 'stopped' | 'failed', message?: string): Promise<void>;
}

export function createJournal(config: TrainConfig, folder: RunFolder, { onEvent }: TrainOptions): Journal {
  const waiting: TrainEvent[] = [];
  let log: TrainLog | undefined;
  let reporter: TrainReporter | undefined;
  let position: RunPosition = { stage: 0, step: 0 };
  const emit = (event: TrainEvent) => {
    onEvent?.(event);
    if (event.type !== 'start') position = { stage: event.stage, step: event.step };
    if (log) void log.append(event);
    else waiting.push(event);
  };
  const now = () => new Date().toISOString();
  const note = (message: string) => emit({ type: 'note', time: now(), ...position, message });
  let described: string | undefined;
  return {
    describe(data) {
      described = data;
    },
    async open(at) {
      position = at;
      if (log) return;
      const onProblem = (message: string) => onEvent?.({ type: 'note', time: now(), ...position, message });
      log = await openTrainLog(folder.log, { at, onProblem });
      reporter = trainReporter({ folder: folder.path, log, title: config.name, onProblem });
      const before = config.stages.slice(0, at.stage).reduce((sum, stage) => sum + stepsOf(stage), 0) + at.step;
      emit({
        type: 'start',
        time: now(),
        name: config.name,
        stages: config.stages.map((stage) => ({ name: stage.name, steps: stepsOf(stage) })),
        settings: { ...config },
        ...(described !== undefined && { data: described }),
        ...(before > 0 && { resumedFrom: before }),
      });
      for (const event of waiting.splice(0))
        void log.append({ ...event, ...(event.type !== 'start' && at) } as TrainEvent);
    },
    emit,
    note,
    flush: async () => log?.flush(),
    async end(reason, message) {
      if (!log) return;
      emit({ type: 'end', time: now(), ...position, reason, ...(message !== undefined && { message }) });
      await log.flush();
      await reporter?.close();
      await log.close();
    },
  };
}

function stepsOf(stage: StageConfig): number {
  return stage.train === 'tokenizers' ? 0 : stage.steps;
}

/** Tells whoever started it, and keeps nothing: for work beside a run. */
export function silentJournal({ onEvent }: TrainOptions): Journal {
  const note = (message: string) =>
    onEvent?.({ type: 'note', time: new Date().toISOString(), stage: 0, step: 0, message });
  return {
    describe: () => undefined,
    open: async () => undefined,
    emit: (event) => onEvent?.(event),
    note,
    end: async () => undefined,
    flush: async () => undefined,
  };
}
