/** A training run from its configuration to its model: stage after stage, each from what the one before made. */

import { createHash } from 'node:crypto';
import { rm } from 'node:fs/promises';
import { join, relative } from 'node:path';
import { MmditxError } from '../errors.ts';
import { writePng } from '../image/files.node.ts';
import { fitPreviewFactors } from '../image/preview.ts';
import { latentOf, loadAutoencoder } from '../models/autoencoder.ts';
import { DEFAULTS_KEY, PREVIEW_KEY } from '../pipeline/defaults.ts';
import { readTokenizers } from '../pipeline/open.node.ts';
import { createPipeline } from '../pipeline/pipeline.ts';
import { fastestRuntime } from '../runtime/fastest.node.ts';
import { nodeRuntime } from '../runtime/node.node.ts';
import type { Runtime } from '../runtime/runtime.ts';
import type { FloatTensor } from '../tensor/data.ts';
import { clipTokenizer, t5Tokenizer } from '../text/tokenizer.ts';
import { type PartName, partTitles } from '../weights/checkpoint.ts';
import { fileSource } from '../weights/files.node.ts';
import { type Lora, openLora } from '../weights/lora.ts';
import { storedBytes } from '../weights/stored.ts';
import { autoencoderWork } from './autoencoder.node.ts';
import { allViews, type Entry, stepRandom, VALIDATION_STREAM } from './batches.ts';
import type { DiffusionStage, StageConfig, TrainConfig } from './config.ts';
import { readTrainConfig, type TrainConfigFile } from './config-file.node.ts';
import { type CaptionLimits, dataText, entryCaptions, type ReadData, readData, stageEntries } from './datasets.node.ts';
import { type DiffusionWork, diffusionWork } from './diffusion.node.ts';
import { openEncodedCache } from './encoded-cache.node.ts';
import { createEncodings } from './encodings.node.ts';
import { openTrainLog, type TrainLog, type TrainReporter, trainReporter } from './log.node.ts';
import type { RunPosition, SamplePicture, TrainEvent } from './log.ts';
import { exportModel, openModel, type TrainingModel, withFile, withPart } from './model.node.ts';
import { renderPicture } from './pictures.node.ts';
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
import { restoreStage, runStage, type StageFingerprints, type StageLoopOptions, type StageWork } from './stage.node.ts';
import { TOKENIZER_FILES, trainTokenizers } from './tokenizers.node.ts';

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
      await exportAll(context, model, made[0]!);
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

/** The log and the report of a run. */
interface Journal {
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
        const { encodings } = await encode(context, model, stage, stageEntries(data, stage.data));
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

function silentJournal({ onEvent }: TrainOptions): Journal {
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

async function runtimeOf(config: TrainConfig, { runtime }: TrainOptions): Promise<Runtime> {
  if (runtime) return runtime;
  return config.device
    ? nodeRuntime({ device: config.device, ...threadsOf(config) })
    : fastestRuntime(threadsOf(config));
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

interface RunContext extends TrainConfigFile {
  readonly folder: RunFolder;
  readonly runtime: Runtime;
  readonly data: ReadonlyMap<string, ReadData>;
  readonly journal: Journal;
  readonly options: TrainOptions;
}

function createJournal(config: TrainConfig, folder: RunFolder, { onEvent }: TrainOptions): Journal {
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

function threadsOf({ threads }: TrainConfig): { threads?: number } {
  return threads === undefined ? {} : { threads };
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
  const { encodings, usable, cached } = await encode(context, model, stage, entries);
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

/** Encodes what a diffusion stage shows, as far as it can be known before; pictures that cannot be decoded are left out. */
async function encode(
  context: RunContext,
  model: TrainingModel,
  stage: DiffusionStage,
  entries: { training: readonly Entry[]; heldOut: readonly Entry[] },
) {
  const { config, folder, runtime, resolve, journal, options } = context;
  const { signal, onPreparation } = options;
  const cached = config.cache !== false;
  const cache = cached
    ? await openEncodedCache(typeof config.cache === 'string' ? resolve(config.cache) : folder.cache)
    : undefined;
  const { parts, files, tokenizers } = model;
  const all = [...entries.training, ...entries.heldOut];
  const { t5Tokens } = stage.text;
  const work = encodingWork(all, stage, model);
  const encodings = createEncodings({
    checkpoint: { parts, files, tokenizers },
    runtime,
    ...(cache && { cache }),
    keepTexts: work.texts.length > 0,
    ...(t5Tokens !== undefined && { tokens: { t5Tokens: { length: t5Tokens } } }),
  });
  if (!cached) return { encodings, usable: await decodable(context, entries), cached };
  const skipped = new Set<string>();
  await encodings.fill(work, {
    signal,
    onProgress: ({ part, done, total }) =>
      onPreparation?.({ what: `Encoding with the ${partTitles[part]}`, done, total }),
    onSkip: ({ picture }, error) => {
      if (!skipped.has(picture.path)) journal.note(error.message);
      skipped.add(picture.path);
    },
  });
  return { encodings, usable: without(skipped, entries, stage), cached };
}

type Entries = { readonly training: readonly Entry[]; readonly heldOut: readonly Entry[] };

function without(skipped: ReadonlySet<string>, { training, heldOut }: Entries, stage?: StageConfig): Entries {
  const usable = (list: readonly Entry[]) => list.filter(({ picture }) => !skipped.has(picture.path));
  const left = { training: usable(training), heldOut: usable(heldOut) };
  if (left.training.length > 0) return left;
  throw new MmditxError(
    'bad-file',
    `None of the pictures${stage ? ` of stage "${stage.name}"` : ''} can be decoded; repair them or give others.`,
  );
}

/** Leaves out pictures that cannot be decoded, which their headers do not tell. */
async function decodable(
  { journal, options: { signal, onPreparation } }: RunContext,
  entries: Entries,
): Promise<Entries> {
  const first = new Map([...entries.training, ...entries.heldOut].map((entry) => [entry.picture.path, entry]));
  const skipped = new Set<string>();
  let done = 0;
  for (const [path, entry] of first) {
    signal?.throwIfAborted();
    await renderPicture(entry.picture, allViews(entry)[0]!).catch((error: unknown) => {
      if (!(error instanceof MmditxError) || error.code === 'bad-option') throw error;
      skipped.add(path);
      journal.note(error.message);
    });
    onPreparation?.({ what: 'Checking pictures', done: ++done, total: first.size });
  }
  return without(skipped, entries);
}

/** More texts than this are encoded when they are shown, where the encoders are small: each takes files. */
const MOST_TEXTS_AHEAD = 20_000;
/** Encoders with more weights are not kept beside the transformer. */
const SMALL_ENCODERS = 2 ** 30;

/** Every view that a stage can show, and its texts where they are not too many. */
export function encodingWork(
  entries: readonly Entry[],
  { textEncoders }: Pick<DiffusionStage, 'textEncoders'>,
  { parts }: Pick<TrainingModel, 'parts'>,
) {
  const texts = new Set<string>(['']);
  // Where captions are shuffled, no text may come again.
  let listed = true;
  const latents: { picture: Entry['picture']; view: ReturnType<typeof allViews>[number] }[] = [];
  const seen = new Set<Entry>();
  for (const entry of entries) {
    if (seen.has(entry)) continue;
    seen.add(entry);
    for (const view of allViews(entry)) latents.push({ picture: entry.picture, view });
    if (textEncoders === 'frozen' && listed) {
      const own = entryCaptions(entry);
      listed = own !== undefined;
      for (const text of own ?? []) texts.add(text);
    }
  }
  const weights = [parts.clipL, parts.clipG, parts.t5].flatMap((part) => [...(part?.tensors.values() ?? [])]);
  const small = weights.reduce((sum, weight) => sum + storedBytes(weight), 0) <= SMALL_ENCODERS;
  const ahead = textEncoders === 'frozen' && listed && (!small || texts.size <= MOST_TEXTS_AHEAD);
  return { latents, texts: ahead ? [...texts] : [] };
}

/** Draws the sample pictures with the weights of the moment. */
async function drawSamples(
  { config, folder, runtime }: RunContext,
  model: TrainingModel,
  work: DiffusionWork,
  stage: DiffusionStage,
  step: number,
): Promise<SamplePicture[]> {
  const current = join(folder.samples, '.current');
  const written = await work.write(current);
  let sampled: TrainingModel = { ...model, close: async () => undefined };
  for (const path of written.parts) sampled = await withFile(sampled, path);
  const lora = written.lora === undefined ? undefined : await readLora(written.lora);
  const pipeline = createPipeline({
    checkpoint: sampled,
    runtime,
    tokenizers: model.tokenizers,
    model: { name: config.name, hash: null },
  });
  try {
    const pictures: SamplePicture[] = [];
    const { prompts, steps, cfg } = config.samples!;
    for (const [i, { prompt, negative, size, seed }] of prompts.entries()) {
      const [width, height] = size ?? [pipeline.defaults.width, pipeline.defaults.height];
      const [image] = await pipeline.generate({
        prompt,
        negativePrompt: negative,
        width,
        height,
        steps,
        cfg,
        seed,
        ...(lora && { loras: [{ lora, strength: 1 }] }),
      });
      const file = join(folder.samples, `${stage.name}-${String(step).padStart(6, '0')}-${i + 1}.png`);
      await writePng(file, image!.png());
      pictures.push({ prompt, seed, file: relative(folder.path, file), width, height });
    }
    return pictures;
  } finally {
    await pipeline.dispose();
    await sampled.close();
    await rm(current, { recursive: true, force: true });
  }
}

async function readLora(path: string): Promise<Lora> {
  const source = await fileSource(path);
  try {
    return await openLora(source);
  } finally {
    await source.close();
  }
}

/** Latents that the preview's factors are fitted on. */
const PREVIEW_LATENTS = 200;

/** Writes the finished model with what it says about its use. */
async function exportAll(context: RunContext, model: TrainingModel, path: string): Promise<void> {
  const { config, data, runtime } = context;
  const { precision, defaults } = config.export!;
  const last = config.stages.findLast((stage) => stage.train === 'diffusion');
  const metadata: Record<string, string> = { [DEFAULTS_KEY]: JSON.stringify(defaults) };
  if (last && model.parts.vae) {
    const { training } = stageEntries(data, last.data);
    const random = stepRandom(config.seed, VALIDATION_STREAM);
    const chosen = [...random.permutation(training.length)].slice(0, PREVIEW_LATENTS).map((i) => training[i]!);
    const { encodings, usable } = await encode(context, model, last, { training: chosen, heldOut: [] });
    const vae = loadAutoencoder(runtime, model.parts.vae);
    const latents: FloatTensor[] = [];
    for (const entry of usable.training) {
      const [moments] = await encodings.latents([{ picture: entry.picture, view: allViews(entry)[0]! }]);
      latents.push(latentOf(moments!, model.parts.vae.config));
    }
    const factors = await fitPreviewFactors((latent) => vae.decode(latent), model.parts.vae.config.latentChannels, {
      latents,
    });
    metadata[PREVIEW_KEY] = JSON.stringify(factors);
    await vae.dispose();
    await encodings.dispose();
  }
  await exportModel(model, path, { precision, metadata });
}
