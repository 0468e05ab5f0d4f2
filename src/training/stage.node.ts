/**
 * The loop of a stage: steps, saved states, validation, sample pictures, and going on after a kill as if there had been
 * none. What a step is computed on is for the stage to say (`diffusion.node.ts`, `autoencoder.node.ts`).
 */

import { MmditxError } from '../errors.ts';
import { latestCheckpoint, saveCheckpoint } from './checkpoints.node.ts';
import type { PictureSize, StageConfig, TrainConfig } from './config.ts';
import type { Batch } from './gradients.ts';
import { learningRate } from './learning-rate.ts';
import type { TrainEvent } from './log.ts';
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
  /** Tells runs of other configurations apart. */
  readonly fingerprint: string;
  readonly emit: (event: TrainEvent) => void;
  readonly signal?: AbortSignal | undefined;
}

/** Where a run goes on: the newest saved state, if it is of this stage. */
export async function restoreStage(
  trainer: Trainer,
  {
    index,
    checkpoints,
    fingerprint,
    config,
  }: Pick<StageLoopOptions, 'index' | 'checkpoints' | 'fingerprint' | 'config'>,
  onProblem: (message: string) => void,
): Promise<{ step: number; file?: string }> {
  const saved = await latestCheckpoint(checkpoints, { onProblem });
  if (!saved || saved.stage !== index) return { step: 0 };
  if (saved.metadata[FINGERPRINT_KEY] !== fingerprint) {
    throw new MmditxError(
      'bad-option',
      `The configuration of ${config.name} has changed since ${saved.path} was saved; undo the change, or give the run another "output".`,
    );
  }
  trainer.restore(saved.tensors);
  return { step: saved.step, file: saved.path };
}
const FINGERPRINT_KEY = 'mmditx.training';

/**
 * Runs a stage from the step that its trainer is at to its end.
 * @param lastGood the state that the trainer was restored from
 * @throws MmditxError `not-finite` with the step, the batch and the last good state; the signal's reason, after saving
 */
export async function runStage(work: StageWork, options: StageLoopOptions, lastGood?: string): Promise<void> {
  const { config, stage, index, checkpoints, fingerprint, emit, signal } = options;
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
      metadata: { [FINGERPRINT_KEY]: fingerprint },
    };
    const { keep, keepEvery } = config.checkpoints;
    try {
      saved = await saveCheckpoint(checkpoints, state, { keep, ...(keepEvery !== undefined && { keepEvery }) });
      savedStep = trainer.steps;
      emit({ type: 'checkpoint', stage: index, step: trainer.steps, file: saved });
    } catch (error) {
      if (required || !(error instanceof MmditxError)) throw error;
      note(`${error.message} Training goes on; the last saved state is ${saved ?? 'none'}.`);
    }
  };

  /** Batches are made while the one before is computed. */
  let next: Promise<StageBatch[]> | undefined;
  const batchesOf = (step: number) => {
    const made = Promise.all(
      Array.from({ length: stage.accumulate }, (_, i) => work.batchAt(step * stage.accumulate + i)),
    );
    // Reported where it is awaited.
    made.catch(() => undefined);
    return made;
  };

  while (trainer.steps < stage.steps) {
    if (signal?.aborted) {
      if (savedStep !== trainer.steps) await save(true);
      signal.throwIfAborted();
    }
    const started = performance.now();
    const step = trainer.steps;
    const batches = await (next ?? batchesOf(step));
    next = step + 1 < stage.steps ? batchesOf(step + 1) : undefined;
    const learning = rate(step);
    const report = await trainer
      .step(
        batches.map(({ batch }) => batch),
        learning,
      )
      .catch((error: unknown) => {
        if (!(error instanceof NotFiniteError)) throw error;
        const names = batches.flatMap((each) => each.names);
        throw new MmditxError(
          'not-finite',
          `Stage "${stage.name}" stopped at step ${error.step}: ${error.message}; the batch was ${names.join(', ')}; ` +
            `the last good state is ${saved ?? 'the beginning of the stage'}. ` +
            'Lower the learning rate or look at these pictures, and start again to go on from there.',
        );
      });
    const { size, epoch } = batches[0]!;
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
    if (work.validate && config.validation && (report.step % config.validation.every === 0 || last)) {
      const losses = await work.validate();
      emit({ type: 'validation', stage: index, step: report.step, losses: [...losses], mean: meanLoss(losses) });
    }
    if (work.sample && config.samples && (report.step % config.samples.every === 0 || last)) {
      emit({ type: 'samples', stage: index, step: report.step, pictures: await work.sample(report.step) });
    }
    if (report.step % config.checkpoints.every === 0 || last) await save(false);
  }
}

/** The mean over all levels but pure noise (SD3 paper). */
function meanLoss(losses: readonly { sigma: number; loss: number }[]): number {
  const below = losses.filter(({ sigma }) => sigma < 1);
  return below.reduce((sum, { loss }) => sum + loss, 0) / below.length;
}
