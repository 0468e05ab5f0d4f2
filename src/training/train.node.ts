/** A training run from its configuration to its model: stage after stage, each from what the one before made. */

import { createHash } from 'node:crypto';
import { join, relative } from 'node:path';
import { MmditxError } from '../errors.ts';
import { readTokenizers } from '../pipeline/open.node.ts';
import { clipTokenizer, t5Tokenizer } from '../text/tokenizer.ts';
import type { PartName } from '../weights/checkpoint.ts';
import { autoencoderWork } from './autoencoder.node.ts';
import type { StageConfig } from './config.ts';
import { readTrainConfig, type TrainConfigFile } from './config-file.node.ts';
import { type CaptionLimits, dataText, type ReadData, readData, stageEntries } from './datasets.node.ts';
import { diffusionWork } from './diffusion.node.ts';
import { exportRun } from './export.node.ts';
import { createJournal, silentJournal } from './journal.node.ts';
import { openModel, type TrainingModel, withFile, withPart } from './model.node.ts';
import { type RunContext, runtimeOf, type TrainOptions } from './run-context.node.ts';
import {
  lockRun,
  type RunFolder,
  type RunMaterial,
  readStageRecord,
  runFolder,
  type StageRecord,
  stageFingerprints,
  writeStageRecord,
} from './run-folder.node.ts';
import { drawSamples } from './samples.node.ts';
import { restoreStage, runStage, type StageFingerprints, type StageLoopOptions, type StageWork } from './stage.node.ts';
import { decodable, encodeStage } from './stage-data.node.ts';
import { TOKENIZER_FILES, trainTokenizers } from './tokenizers.node.ts';

export type { TrainOptions } from './run-context.node.ts';

export interface TrainResult {
  /** The exported model, or the files that the last stage made. */
  readonly files: readonly string[];
  readonly folder: string;
}

/**
 * Trains as a configuration file says, from the beginning or from where the run stopped.
 * @throws MmditxError for a wrong configuration before any work; `not-finite`, `io`; the signal's reason
 */
export async function train(configPath: string, options: TrainOptions = {}): Promise<TrainResult> {
  const file = await readTrainConfig(configPath);
  const folder = runFolder(file.output);
  const unlock = await lockRun(folder);
  try {
    return await run(file, folder, options);
  } finally {
    await unlock();
  }
}

async function run(file: TrainConfigFile, folder: RunFolder, options: TrainOptions): Promise<TrainResult> {
  const { config, resolve } = file;
  const { signal } = options;
  const runtime = await runtimeOf(config, options);
  const data = await readConfiguredData(file, options);
  const journal = createJournal(config, folder, options);
  const context: RunContext = { ...file, folder, runtime, data, journal, options };
  let model = await openModel(config, resolve, journal.note);
  const found = dataText(data, captionLimits(model));
  journal.describe(found);
  options.onData?.(found);
  if (config.validation && [...data.values()].every(({ heldOut }) => heldOut.length === 0)) {
    journal.note(
      'No picture is kept for validation: there are too few; raise validation.share or give validation.path.',
    );
  }
  const material: RunMaterial = { data: dataDigests(data), model: model.identity };
  let made: string[] = [];
  try {
    for (const [index, stage] of config.stages.entries()) {
      model = await withFreshParts(context, model, stage);
      const stageFolder = folder.stage(index, stage);
      const fingerprints = stageFingerprints(config, index, material);
      let record = await readStageRecord(stageFolder);
      if (record && record.fingerprint !== fingerprints.exact) {
        throw new MmditxError(
          'bad-option',
          `Stage "${stage.name}" in ${folder.path} was made with another configuration, or other pictures, captions or model; ` +
            'undo the change, or give the run another "output".',
        );
      }
      record ??= await runStageOf(context, model, stage, index, fingerprints);
      model = await withRecord(model, record, stageFolder);
      const names = [...record.parts, ...(record.lora === undefined ? [] : [record.lora])];
      made = names.map((name) => join(stageFolder, name));
    }
    if (config.export) {
      made = [resolve(config.export.file)];
      await exportRun(context, model, made[0]!);
    }
    await journal.end('finished');
    return { files: made, folder: folder.path };
  } catch (error) {
    const stopped = signal?.aborted && error === signal.reason;
    await journal.end(
      stopped ? 'stopped' : 'failed',
      stopped ? undefined : String(error instanceof Error ? error.message : error),
    );
    throw error;
  } finally {
    await model.close();
  }
}

/** The bytes and captions of each data set, as a digest. */
function dataDigests(data: ReadonlyMap<string, ReadData>): Map<string, string> {
  return new Map(
    [...data].map(([name, { training, heldOut }]) => {
      const pictures = [...training, ...heldOut].map(({ name: file, digest, captions }) => [file, digest, captions]);
      return [name, createHash('sha256').update(JSON.stringify(pictures)).digest('hex')];
    }),
  );
}

function captionLimits({ tokenizers, parts }: TrainingModel): CaptionLimits {
  const positions = (parts.clipL ?? parts.clipG)?.config.positions;
  return {
    clip:
      tokenizers.clip !== undefined && positions ? { tokenizer: clipTokenizer(tokenizers.clip), positions } : undefined,
    t5:
      tokenizers.t5 !== undefined && parts.t5
        ? { tokenizer: t5Tokenizer(tokenizers.t5), tokens: parts.t5.config.tokens }
        : undefined,
  };
}

/**
 * What a configuration's data sets hold, as text for a terminal, without training.
 * @throws MmditxError as {@link train}
 */
export async function describeData(
  configPath: string,
  options: Pick<TrainOptions, 'signal' | 'onPreparation'> = {},
): Promise<string> {
  const { config, resolve } = await readTrainConfig(configPath);
  const data = await readConfiguredData({ config, resolve }, options);
  const { precision: _, ...asStored } = config;
  const model = await openModel(asStored, resolve, () => undefined);
  try {
    return dataText(data, captionLimits(model));
  } finally {
    await model.close();
  }
}

/**
 * Encodes the pictures and texts of a configuration's diffusion stages into their cache, which several processes on
 * several machines may do at once over one folder. Stages behind one that trains the autoencoder wait for it.
 * @returns whether everything was encoded
 * @throws MmditxError as {@link train}
 */
export async function encodeData(configPath: string, options: TrainOptions = {}): Promise<boolean> {
  const file = await readTrainConfig(configPath);
  const { config, resolve } = file;
  if (config.cache === false) {
    throw new MmditxError(
      'bad-option',
      `${configPath} has cache: false, so that there is nothing to encode ahead; remove it.`,
    );
  }
  const folder = runFolder(file.output);
  const runtime = await runtimeOf(config, options);
  const data = await readConfiguredData(file, options);
  const journal = silentJournal(options);
  const context: RunContext = { ...file, folder, runtime, data, journal, options };
  let model = await openModel(config, resolve, journal.note);
  try {
    for (const [index, stage] of config.stages.entries()) {
      const record = await readStageRecord(folder.stage(index, stage));
      model = await withFreshParts(context, model, stage);
      if (stage.train === 'diffusion') {
        const { encodings } = await encodeStage(context, model, stage, stageEntries(data, stage.data));
        await encodings.dispose();
      } else if (!record) return false;
      if (record) model = await withRecord(model, record, folder.stage(index, stage));
      else if (stage.train === 'diffusion' && stage.textEncoders === 'full') return index === config.stages.length - 1;
    }
    return true;
  } finally {
    await model.close();
  }
}

function readConfiguredData(
  { config, resolve }: Pick<TrainConfigFile, 'config' | 'resolve'>,
  { signal, onPreparation }: Pick<TrainOptions, 'signal' | 'onPreparation'>,
) {
  return readData(config, resolve, {
    signal,
    onProgress: (name, done, total) => onPreparation?.({ what: `Reading ${name}`, done, total }),
  });
}

/** The model with what a finished stage made. */
async function withRecord(model: TrainingModel, record: StageRecord, folder: string): Promise<TrainingModel> {
  let complete = model;
  for (const part of record.parts) complete = await withFile(complete, join(folder, part));
  if (record.tokenizers) {
    const tokenizers = await readTokenizers({ tokenizers: {} }, folder, {
      clipTokenizer: join(folder, TOKENIZER_FILES.clip),
      t5Tokenizer: join(folder, TOKENIZER_FILES.t5),
    });
    complete = { ...complete, tokenizers };
  }
  return record.lora === undefined ? complete : { ...complete, lora: join(folder, record.lora) };
}

/** Adds the networks that a stage needs and no file has. */
async function withFreshParts(context: RunContext, model: TrainingModel, stage: StageConfig): Promise<TrainingModel> {
  const { config, folder } = context;
  const wanted: PartName[] =
    stage.train === 'autoencoder'
      ? ['vae']
      : stage.train === 'diffusion'
        ? ['vae', ...(config.networks ? (['clipL', 'clipG', 't5'] as const) : []), 'transformer']
        : [];
  let complete = model;
  for (const part of wanted) complete = await withPart(complete, part, config, folder.initial);
  return complete;
}

/** Runs a stage, or what is left of it. */
async function runStageOf(
  context: RunContext,
  model: TrainingModel,
  stage: StageConfig,
  index: number,
  fingerprints: StageFingerprints,
): Promise<StageRecord> {
  const fingerprint = fingerprints.exact;
  const { folder, data, journal } = context;
  const output = folder.stage(index, stage);
  const entries = stageEntries(data, stage.data);
  if (stage.train === 'tokenizers') {
    await journal.open({ stage: index, step: 0 });
    await trainTokenizers(stage, [...entries.training, ...entries.heldOut], output);
    return finish(output, { fingerprint, parts: [], tokenizers: true });
  }
  if (stage.train === 'autoencoder') {
    const { config, runtime } = context;
    const { training } = await decodable(context, { training: entries.training, heldOut: [] });
    const work = await autoencoderWork({ config, stage, index, model, runtime, training });
    try {
      await runWork(context, work, stage, index, fingerprints);
      return await finish(output, { fingerprint, ...relativeTo(output, await work.write(output)) });
    } finally {
      await work.dispose();
    }
  }
  const { encodings, usable, cached } = await encodeStage(context, model, stage, entries);
  try {
    const { config, runtime, resolve } = context;
    const work = await diffusionWork({ config, stage, index, model, runtime, ...usable, encodings, cached, resolve });
    try {
      const sample = config.samples && ((step: number) => drawSamples(context, model, work, stage, step));
      await runWork(context, { ...work, ...(sample && { sample }) }, stage, index, fingerprints);
      return await finish(output, { fingerprint, ...relativeTo(output, await work.write(output)) });
    } finally {
      await work.dispose();
    }
  } finally {
    await encodings.dispose();
  }
}

async function finish(folder: string, record: StageRecord): Promise<StageRecord> {
  await writeStageRecord(folder, record);
  return record;
}

function relativeTo(folder: string, { parts, lora }: { readonly parts: readonly string[]; readonly lora?: string }) {
  return {
    parts: parts.map((path) => relative(folder, path)),
    ...(lora !== undefined && { lora: relative(folder, lora) }),
  };
}

async function runWork(
  { config, folder, journal, options }: RunContext,
  work: StageWork,
  stage: Exclude<StageConfig, { train: 'tokenizers' }>,
  index: number,
  fingerprints: StageFingerprints,
): Promise<void> {
  const loop: StageLoopOptions = {
    config,
    stage,
    index,
    checkpoints: folder.checkpoints,
    fingerprints,
    emit: journal.emit,
    flush: journal.flush,
    signal: options.signal,
  };
  const problems: string[] = [];
  const { step, file } = await restoreStage(work.trainer, loop, (message) => problems.push(message));
  await journal.open({ stage: index, step });
  for (const message of problems) journal.note(message);
  await runStage(work, loop, file);
}
