/**
 * The loop of a stage: steps, saved states, validation, sample pictures, and going on after a kill as if there had been
 * none. What a step is computed on is for the stage to say (`diffusion.node.ts`, `autoencoder.node.ts`).
 */

import { MmditxError } from '../errors.ts';
import { latestCheckpoint, listCheckpoints, saveCheckpoint } from './checkpoints.node.ts';
import type { PictureSize, StageConfig, TrainConfig } from './config.ts';
import type { Batch } from './gradients.ts';
import { learningRate } from './learning-rate.ts';
import type { TrainEvent } from './log.ts';
import { validationMean } from './timesteps.ts';
import { NotFiniteError, type Trainer } from './trainer.ts';

/** A batch, and what reports say about it. */
export interface StageBatch {
  readonly batch: Batch;
  /** Names of its pictures. */
  readonly names: readonly string[];
  readonly size: PictureSize;
  readonly epoch: number;
}

/** A stage ready to run. */
export interface StageWork {
  readonly trainer: Trainer;
  /** The batch of a number, counted from 0 through the stage: always the same for the same number. */
  batchAt(index: number): Promise<StageBatch>;
  /** Losses at fixed noise levels. */
  validate?(): Promise<readonly { sigma: number; loss: number }[]>;
  /** Draws the sample pictures with the averaged weights of the moment; gives their files. */
  sample?(step: number): Promise<Extract<TrainEvent, { type: 'samples' }>['pictures']>;
}

export interface StageLoopOptions {
  readonly config: TrainConfig;
  readonly stage: Exclude<StageConfig, { train: 'tokenizers' }>;
  readonly index: number;
  /** Folder of saved states. */
  readonly checkpoints: string;
  readonly fingerprints: StageFingerprints;
  readonly emit: (event: TrainEvent) => void;
  /** Waits until the log is on the disk, so that it is never behind a saved state. */
  readonly flush?: () => Promise<void>;
  readonly signal?: AbortSignal | undefined;
}

/** Tell runs of other configurations and data apart. */
export interface StageFingerprints {
  /** Of everything that decides what the stage makes. */
  readonly exact: string;
  /** Of that without the settings of the optimiser, which may be changed to go on: a lower learning rate, more steps. */
  readonly resumable: string;
}

/**
 * Where a run goes on: the newest saved state of the stage.
 * @throws MmditxError `bad-option` when it was saved with another configuration
 */
export async function restoreStage(
  trainer: Trainer,
  {
    index,
    checkpoints,
    fingerprints,
    config,
  }: Pick<StageLoopOptions, 'index' | 'checkpoints' | 'fingerprints' | 'config'>,
  onProblem: (message: string) => void,
): Promise<{ step: number; file?: string }> {
  // States are large: those of the stage before are not read.
  const [newest] = await listCheckpoints(checkpoints);
  if (newest?.stage !== index) return { step: 0 };
  const saved = await latestCheckpoint(checkpoints, { onProblem });
  if (saved?.stage !== index) return { step: 0 };
  if (saved.metadata[RESUMABLE_KEY] !== fingerprints.resumable) {
    throw new MmditxError(
      'bad-option',
      `The configuration of ${config.name}, or its pictures, captions or model, have changed since ${saved.path} was saved; ` +
        'undo the change, or give the run another "output".',
    );
  }
  if (saved.metadata[EXACT_KEY] !== fingerprints.exact) {
    onProblem(`The settings of the optimiser have changed since step ${saved.step}, from which the run goes on.`);
  }
  trainer.restore(saved.tensors);
  return { step: saved.step, file: saved.path };
}
const EXACT_KEY = 'mmditx.training';
const RESUMABLE_KEY = 'mmditx.training.resumable';

/**
 * Runs a stage from the step that its trainer is at to its end.
 * @param lastGood the state that the trainer was restored from
 * @throws MmditxError `not-finite` with the step, the batch and the last good state; the signal's reason, after saving
 */
export async function runStage(work: StageWork, options: StageLoopOptions, lastGood?: string): Promise<void> {
  const { config, stage, index, checkpoints, fingerprints, emit, flush, signal } = options;
  const { trainer } = work;
  const rate = learningRate(stage.learningRate, stage.steps);
  let saved = lastGood;
  let savedStep = trainer.steps;
  const note = (message: string) =>
    emit({ type: 'note', time: new Date().toISOString(), stage: index, step: trainer.steps, message });

  /** A full disk costs nothing but the state: training goes on, and tries again at the next turn. */
  const save = async (required: boolean) => {
    const state = {
      stage: index,
      step: trainer.steps,
      tensors: trainer.state(),
      metadata: { [EXACT_KEY]: fingerprints.exact, [RESUMABLE_KEY]: fingerprints.resumable },
    };
    const { keep, keepEvery } = config.checkpoints;
    try {
      await flush?.();
      saved = await saveCheckpoint(checkpoints, state, { keep, ...(keepEvery !== undefined && { keepEvery }) });
      savedStep = trainer.steps;
      emit({ type: 'checkpoint', stage: index, step: trainer.steps, file: saved });
    } catch (error) {
      if (required || !(error instanceof MmditxError)) throw error;
      note(`${error.message} Training goes on; the last saved state is ${saved ?? 'none'}.`);
    }
  };

  /** What is good to have but not worth losing a run for. */
  const attempt = async (what: string, action: () => Promise<void>) => {
    try {
      await action();
    } catch (error) {
      if (!(error instanceof MmditxError)) throw error;
      note(`${what}: ${error.message}`);
    }
  };

  const lastBatch = stage.steps * stage.accumulate;
  /** The next batch is made while the one before is computed. */
  let ahead: { index: number; batch: Promise<StageBatch> } | undefined;
  const makeAhead = (number: number) => {
    ahead = number < lastBatch ? { index: number, batch: work.batchAt(number) } : undefined;
    // Reported where it is awaited.
    ahead?.batch.catch(() => undefined);
  };
  const nextBatch = async (number: number): Promise<StageBatch> => {
    if (ahead?.index !== number) makeAhead(number);
    const batch = await ahead!.batch;
    makeAhead(number + 1);
    return batch;
  };

  try {
    while (trainer.steps < stage.steps) {
      if (signal?.aborted) {
        if (savedStep !== trainer.steps) await save(true);
        signal.throwIfAborted();
      }
      const started = performance.now();
      const learning = rate(trainer.steps);
      const shown: Pick<StageBatch, 'names' | 'size' | 'epoch'>[] = [];
      const batches = async function* (first: number) {
        for (let i = 0; i < stage.accumulate; i++) {
          const { batch, ...about } = await nextBatch(first + i);
          shown.push(about);
          yield batch;
        }
      };
      const report = await trainer.step(batches(trainer.steps * stage.accumulate), learning).catch((error: unknown) => {
        if (!(error instanceof NotFiniteError)) throw error;
        throw new MmditxError(
          'not-finite',
          `Stage "${stage.name}" stopped at step ${error.step}: ${error.message}; the batch was ` +
            `${shown.flatMap(({ names }) => names).join(', ')}; the last good state is ${saved ?? 'the beginning of the stage'}. ` +
            'Set a lower learning rate and start again to go on from there; where that state is too late already, remove it.',
        );
      });
      const { size, epoch } = shown[0]!;
      emit({
        type: 'step',
        time: new Date().toISOString(),
        stage: index,
        step: report.step,
        loss: report.loss,
        norm: report.norm,
        learningRate: learning,
        seconds: (performance.now() - started) / 1000,
        size: [...size],
        epoch,
        ...(Object.keys(report.metrics).length > 0 && { metrics: { ...report.metrics } }),
      });
      const last = report.step === stage.steps;
      const due = (every: number) => report.step % every === 0 || last;
      if (work.validate && config.validation && due(config.validation.every)) {
        await attempt('The validation loss could not be computed', async () => {
          const losses = await work.validate!();
          const mean = validationMean(losses);
          emit({ type: 'validation', stage: index, step: report.step, losses: [...losses], mean });
        });
      }
      if (work.sample && config.samples && due(config.samples.every)) {
        await attempt('The sample pictures could not be drawn', async () => {
          emit({ type: 'samples', stage: index, step: report.step, pictures: await work.sample!(report.step) });
        });
      }
      if (due(config.checkpoints.every)) await save(false);
    }
  } finally {
    // Whoever ends the stage gives back what batches are made with.
    await ahead?.batch.catch(() => undefined);
  }
}
