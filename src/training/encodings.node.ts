/**
 * What frozen encoders make of pictures and texts: computed once and kept, in memory and in a cache that any number of
 * processes fill together. Everything is rounded to half precision, kept or not, so that a run that finds it in the
 * cache repeats one that computed it.
 */

import { createHash } from 'node:crypto';
import { join } from 'node:path';
import { MmditxError } from '../errors.ts';
import { type Autoencoder, loadAutoencoder } from '../models/autoencoder.ts';
import { batchItems, joinBatches } from '../models/batches.ts';
import type { TransformerConfig } from '../models/config.ts';
import { loadClip, loadT5 } from '../models/text-encoders.ts';
import type { Runtime } from '../runtime/runtime.ts';
import { type FloatTensor, floats, type TensorData, toFloat16, toFloat32 } from '../tensor/data.ts';
import { type Conditioning, type Encoders, encodePrompts } from '../text/conditioning.ts';
import { clipTokenizer, t5Tokenizer } from '../text/tokenizer.ts';
import { type TextEncoders, type TokenOptions, tokenizePrompt } from '../text/tokens.ts';
import { type Checkpoint, type PartName, type PartWeights, partTitles } from '../weights/checkpoint.ts';
import { readExactly } from '../weights/safetensors.ts';
import { storedBytes } from '../weights/stored.ts';
import { doOnce, openClaims } from './claims.node.ts';
import type { DatasetPicture } from './dataset.node.ts';
import { cacheKey, type EncodedCache, type JsonValue } from './encoded-cache.node.ts';
import { type PictureView, renderPicture, viewKey } from './pictures.node.ts';

/** A picture as one of its views shows it. */
export interface LatentRequest {
  readonly picture: Pick<DatasetPicture, 'path' | 'name' | 'digest'>;
  readonly view: PictureView;
}

/** What a CLIP encoder makes of a text. */
export interface EncodedClip {
  /** [1, tokens, width] */
  readonly hidden: FloatTensor;
  /** [1, pooledWidth] */
  readonly pooled: FloatTensor;
}

/** A text as the encoders at hand see it, apart from each other: training drops each by itself. */
export interface EncodedText {
  readonly clipL?: EncodedClip;
  readonly clipG?: EncodedClip;
  /** [1, tokens, width] */
  readonly t5?: FloatTensor;
}

export interface EncodingsOptions {
  /**
   * The networks: the VAE for pictures, of the text encoders those that it has. Its files must stay open as long as the
   * encodings are used. Of a checkpoint whose parts are in another precision, encodings are others.
   */
  readonly checkpoint: Checkpoint;
  readonly runtime: Runtime;
  /** Where encodings are kept; without it, only in memory. */
  readonly cache?: EncodedCache | undefined;
  /** Texts of tokenizer.json files, where the checkpoint does not bring its own. */
  readonly tokenizers?: { readonly clip?: string | undefined; readonly t5?: string | undefined } | undefined;
  /**
   * How texts become tokens. Default as diffusers and kohya sd-scripts do it, so that all texts have one length: no
   * weights in brackets, CLIP's positions and no more, and as many T5 tokens as the model states (77 if nothing).
   */
  readonly tokens?: TokenOptions | undefined;
  /** Whether texts that were not there are added to the cache (default), or only kept in memory: they may never recur. */
  readonly keepTexts?: boolean | undefined;
  /** Bytes of encodings that are kept in memory (default 512 MiB). */
  readonly memoryBytes?: number | undefined;
  /** Called with a text that is encoded and what the user should know of it: words that were cut. */
  onWarning?: ((text: string, message: string) => void) | undefined;
  /** Makes a view's pixels (default {@link renderPicture}). */
  readonly render?: typeof renderPicture | undefined;
}

export interface FillOptions {
  readonly signal?: AbortSignal | undefined;
  /** Called after each batch, and when what other processes did has been found done. */
  onProgress?: ((progress: FillProgress) => void) | undefined;
  /** Called with each picture that cannot be read. */
  onSkip?: ((request: LatentRequest, error: MmditxError) => void) | undefined;
  /** Pictures or texts that are claimed and encoded together (default 16). */
  readonly batchSize?: number | undefined;
  /** See `ClaimsOptions`. */
  readonly staleSeconds?: number | undefined;
}

export interface FillProgress {
  /** The encoder at work. */
  readonly part: PartName;
  /** Pictures or texts, those that were done before included. */
  readonly done: number;
  readonly total: number;
}

/** Tensors that are handed out are shared: they must not be changed. */
export interface Encodings {
  /**
   * Mean and log-variance of pictures as the VAE's encoder gives them, in the VAE's own scale (`latentOf` samples and
   * scales them): one [1, 2 * latentChannels, height / 8, width / 8] for each request.
   * @throws MmditxError `missing-part` without a VAE, `not-finite`; `bad-file` and `io` for pictures
   */
  latents(requests: readonly LatentRequest[]): Promise<FloatTensor[]>;
  /**
   * What the text encoders make of texts.
   * @throws MmditxError `missing-part` without text encoder or tokenizer, `not-finite`; `bad-option` for texts too long
   */
  texts(texts: readonly string[]): Promise<EncodedText[]>;
  /**
   * Encodes what the cache lacks, sharing the work with other processes that do the same: ends when all is there. Each
   * encoder is loaded in turn, and gives its memory back. Without a cache it does nothing.
   * @throws what `latents` and `texts` throw, except that pictures which are `bad-file` are skipped; the signal's reason
   */
  fill(
    wanted: { readonly latents?: readonly LatentRequest[]; readonly texts?: readonly string[] },
    options?: FillOptions,
  ): Promise<void>;
  /** Gives the memory of all networks and encodings back. Used again, they load again. */
  dispose(): Promise<void>;
}

/** Grows when encodings are computed otherwise. */
const FORMAT = 1;

const DEFAULT_MEMORY = 2 ** 29;
/** Texts encoded at once. */
const TEXT_BATCH = 16;
/** Pixels encoded at once: four pictures of 512 x 512. Larger pictures are done one at a time, in tiles. */
const BATCH_PIXELS = 2 ** 20;
/** Where claims lie in the cache's folder. */
const CLAIMS_FOLDER = 'claims';
/** Weights of more bytes are used as they are stored: in float32, T5-XXL's would take 19 GB. */
const EXPANDED_BYTES = 2 ** 31;

/** Prepares the encoders of a checkpoint; each loads when it is first used. */
export function createEncodings(options: EncodingsOptions): Encodings {
  const { cache, keepTexts = true, memoryBytes = DEFAULT_MEMORY } = options;
  const recent = recentlyUsed(memoryBytes);
  const pictures = pictureEncoder(options);
  let textEncoders: readonly Encoder<string>[] | undefined;
  const encodersOfTexts = () => {
    textEncoders ??= createTextEncoders(options);
    return textEncoders;
  };

  const read = async (key: string): Promise<Tensors | undefined> => {
    const stored = await cache?.read(key);
    return stored && expanded(stored);
  };

  /** What an encoder makes of items, in their order, from memory, the cache or the encoder itself. */
  const encodingsOf = async <Item>(encoder: Encoder<Item>, items: readonly Item[]): Promise<Tensors[]> => {
    const keys = await Promise.all(items.map(encoder.key));
    const unique = [...new Map(keys.map((key, i) => [key, items[i]!]))];
    const found = new Map<string, Tensors>();
    await Promise.all(
      unique.map(async ([key]) => {
        const known = recent.get(key) ?? (await read(key));
        if (known) found.set(key, known);
      }),
    );
    const missing = unique.filter(([key]) => !found.has(key));
    const made = missing.length > 0 ? await encoder.encode(missing.map(([, item]) => item)) : [];
    for (const [i, [key]] of missing.entries()) {
      found.set(key, expanded(made[i]!));
      if (encoder.part === 'vae' || keepTexts) await cache?.write(key, made[i]!);
    }
    for (const [key, tensors] of found) recent.set(key, tensors);
    return keys.map((key) => found.get(key)!);
  };

  const fillWith = async <Item>(
    encoder: Encoder<Item>,
    items: readonly Item[],
    { signal, onProgress, batchSize, staleSeconds }: FillOptions,
    onSkip?: (item: Item, error: MmditxError) => void,
  ) => {
    if (!cache || items.length === 0) return;
    const claims = openClaims(join(cache.folder, CLAIMS_FOLDER), { staleSeconds });
    try {
      const work = await Promise.all(items.map(async (item) => ({ key: await encoder.key(item), item })));
      await doOnce(work, {
        cache,
        claims,
        batch: encoder.encode,
        batchSize,
        atOnce: encoder.atOnce,
        signal,
        onProgress: (progress) => onProgress?.({ part: encoder.part, ...progress }),
        onSkip,
      });
    } finally {
      await claims.close();
      await encoder.dispose();
    }
  };

  return {
    async latents(requests) {
      const encoded = await encodingsOf(pictures, requests);
      return encoded.map((tensors) => tensors.get('moments')!);
    },
    async texts(texts) {
      const results: EncodedText[] = texts.map(() => ({}));
      for (const encoder of encodersOfTexts()) {
        for (const [i, tensors] of (await encodingsOf(encoder, texts)).entries()) {
          const hidden = tensors.get('hidden')!;
          const own = encoder.part === 't5' ? hidden : { hidden, pooled: tensors.get('pooled')! };
          results[i] = { ...results[i], [encoder.part]: own };
        }
      }
      return results;
    },
    async fill({ latents = [], texts = [] }, options = {}) {
      // Those of one size beside each other, so that they make batches.
      const bySize = latents.toSorted((a, b) => a.view.width - b.view.width || a.view.height - b.view.height);
      await fillWith(pictures, bySize, options, options.onSkip);
      if (texts.length > 0) for (const encoder of encodersOfTexts()) await fillWith(encoder, texts, options);
    },
    async dispose() {
      recent.clear();
      await Promise.all([pictures, ...(textEncoders ?? [])].map((encoder) => encoder.dispose()));
    },
  };
}

type Tensors = ReadonlyMap<string, FloatTensor>;

/** A network that turns items into tensors, one after the other or many at a time. */
interface Encoder<Item> {
  readonly part: PartName;
  /** Batches at the same time. */
  readonly atOnce?: number;
  /** Says all that the tensors depend on. */
  key(item: Item): Promise<string>;
  /** The tensors of each item, in half precision. */
  encode(items: readonly Item[]): Promise<ReadonlyMap<string, TensorData>[]>;
  dispose(): Promise<void>;
}

function pictureEncoder({ checkpoint, runtime, render = renderPicture }: EncodingsOptions): Encoder<LatentRequest> {
  const weights = checkpoint.parts.vae;
  const requireVae = (): PartWeights<Autoencoder['config']> => {
    if (weights) return weights;
    const files = checkpoint.files.map(({ source }) => source.name).join(', ');
    throw new MmditxError('missing-part', `There is no ${partTitles.vae} in ${files}; add the file that holds it.`);
  };
  const vae = weights && loadAutoencoder(runtime, weights);
  let digest: Promise<string> | undefined;
  return {
    part: 'vae',
    // One reads pictures while the other is in the network.
    atOnce: 2,
    async key({ picture, view }) {
      // A new decoder does not change what the encoder makes.
      digest ??= weightsDigest(requireVae(), (name) => !name.startsWith('decoder.'));
      return cacheKey({ format: FORMAT, kind: 'latent', weights: await digest, view: viewKey(picture, view) });
    },
    async encode(requests) {
      const images = await Promise.all(requests.map(({ picture, view }) => render(picture, view)));
      const results: ReadonlyMap<string, TensorData>[] = [];
      for (const batch of equalSizes(images)) {
        const moments = await vae!.encode(joinBatches(batch.map((i) => images[i]!)));
        for (const [item, i] of batch.entries()) {
          results[i] = new Map([['moments', halved(partTitles.vae, batchItems(moments, item, 1))]]);
        }
      }
      return results;
    },
    dispose: async () => vae?.dispose(),
  };
}

/** Indices of pictures that are encoded together. */
function equalSizes(images: readonly FloatTensor[]): number[][] {
  const bySize = new Map<string, number[]>();
  for (const [i, { shape }] of images.entries()) {
    const size = shape.join('x');
    bySize.set(size, [...(bySize.get(size) ?? []), i]);
  }
  return [...bySize.values()].flatMap((indices) => {
    const [, , height, width] = images[indices[0]!]!.shape as [number, number, number, number];
    const most = Math.max(Math.floor(BATCH_PIXELS / (height * width)), 1);
    return chunks(indices, most);
  });
}

function chunks<T>(items: readonly T[], size: number): T[][] {
  return Array.from({ length: Math.ceil(items.length / size) }, (_, i) => items.slice(i * size, (i + 1) * size));
}

/** One for each text encoder of the checkpoint. */
function createTextEncoders(options: EncodingsOptions): Encoder<string>[] {
  const { checkpoint, runtime, tokenizers: given, onWarning } = options;
  const { clipL, clipG, t5 } = checkpoint.parts;
  if (!clipL && !clipG && !t5) {
    throw new MmditxError('missing-part', 'There is no text encoder; add files with CLIP-L, CLIP-G or T5.');
  }
  const clipJson = checkpoint.tokenizers.clip ?? given?.clip;
  const t5Json = checkpoint.tokenizers.t5 ?? given?.t5;
  if ((clipL || clipG) && clipJson === undefined) throw missingTokenizer('CLIP');
  if (t5 && t5Json === undefined) throw missingTokenizer('T5');
  const tokens: TokenOptions = {
    syntax: 'none',
    longPrompt: 'truncate',
    ...(t5 && { t5Tokens: { length: t5.config.tokens } }),
    ...options.tokens,
  };
  const clip = clipJson === undefined ? undefined : clipTokenizer(clipJson);
  // The two encoders of one prompt are given the same number of rows, so both are always tokenized for.
  const clips: TextEncoders = {
    ...(clipL && clip && { clipL: { tokenizer: clip, positions: clipL.config.positions } }),
    ...(clipG && clip && { clipG: { tokenizer: clip, positions: clipG.config.positions } }),
  };

  const encoder = (
    part: 'clipL' | 'clipG' | 't5',
    weights: PartWeights<object>,
    facts: { tokenizer: string; encoders: TextEncoders; tokens: JsonValue; warns: boolean },
    network: Encoders,
    dispose: () => Promise<void>,
  ): Encoder<string> => {
    const tokenizer = createHash('sha256').update(facts.tokenizer).digest('hex');
    let digest: Promise<string> | undefined;
    return {
      part,
      dispose,
      async key(text) {
        digest ??= weightsDigest(weights);
        return cacheKey({
          format: FORMAT,
          kind: part,
          weights: await digest,
          tokenizer,
          tokens: facts.tokens,
          text,
        });
      },
      async encode(texts) {
        const results: ReadonlyMap<string, TensorData>[] = [];
        for (const some of chunks(texts, TEXT_BATCH)) {
          const prompts = some.map((text) => {
            const prompt = tokenizePrompt(text, facts.encoders, tokens);
            if (facts.warns) for (const message of prompt.warnings) onWarning?.(text, message);
            return prompt;
          });
          // Of one encoder alone, the conditioning is what it gives.
          for (const { context, pooled } of await encodePrompts(prompts, network)) {
            const hidden = halved(partTitles[part], context);
            results.push(
              new Map([
                ['hidden', hidden],
                ...(part === 't5' ? [] : [['pooled', halved(partTitles[part], pooled)] as const]),
              ]),
            );
          }
        }
        return results;
      },
    };
  };

  const { syntax = null, longPrompt = null, t5Tokens = null } = tokens;
  const encoders: Encoder<string>[] = [];
  for (const part of ['clipL', 'clipG'] as const) {
    const weights = checkpoint.parts[part];
    if (!weights) continue;
    const network = loadClip(runtime, weights, { expandWeights: isSmall(weights) });
    const { width: contextWidth, pooledWidth } = weights.config;
    // Both CLIPs read the same text: one warning is enough.
    const warns = part === 'clipL' || !clipL;
    encoders.push(
      encoder(
        part,
        weights,
        { tokenizer: clipJson!, encoders: clips, tokens: { syntax, longPrompt }, warns },
        { [part]: network, contextWidth, pooledWidth },
        network.dispose,
      ),
    );
  }
  if (t5) {
    const network = loadT5(runtime, t5, { expandWeights: isSmall(t5) });
    const encodersT5 = { t5: { tokenizer: t5Tokenizer(t5Json!) } };
    const lengths: JsonValue = t5Tokens && { ...t5Tokens };
    encoders.push(
      encoder(
        't5',
        t5,
        { tokenizer: t5Json!, encoders: encodersT5, tokens: { syntax, t5Tokens: lengths }, warns: true },
        { t5: network, contextWidth: t5.config.width, pooledWidth: 0 },
        network.dispose,
      ),
    );
  }
  return encoders;
}

function missingTokenizer(encoder: string): MmditxError {
  return new MmditxError(
    'missing-part',
    `The checkpoint brings no ${encoder} tokenizer; give the encoder's tokenizer.json (from the model's page on Hugging Face).`,
  );
}

function isSmall({ tensors }: PartWeights<unknown>): boolean {
  return [...tensors.values()].reduce((sum, weight) => sum + storedBytes(weight), 0) <= EXPANDED_BYTES;
}

/**
 * A text as the transformer takes it, zeros in place of what encoders gave that are not kept (the SD3 paper
 * leaves out each by itself; of all three together nothing is left but zeros). With all kept, it is what
 * `encodePrompts` gives.
 * @param widths of the transformer
 * @throws MmditxError `missing-part` for a text that no encoder has seen
 */
export function joinEncodedText(
  { clipL, clipG, t5 }: EncodedText,
  keep: { readonly clipL: boolean; readonly clipG: boolean; readonly t5: boolean },
  { contextWidth, pooledWidth }: Pick<TransformerConfig, 'contextWidth' | 'pooledWidth'>,
): Conditioning {
  const clipTokens = (clipL ?? clipG)?.hidden.shape[1] ?? 0;
  const length = clipTokens + (t5?.shape[1] ?? 0);
  if (length === 0) {
    throw new MmditxError('missing-part', 'The model has no text encoder; add files with CLIP-L, CLIP-G or T5.');
  }
  const context = new Float32Array(length * contextWidth);
  const pooled = new Float32Array(pooledWidth);
  // CLIP-G lies behind CLIP-L, whose place stays empty where there is none.
  const widthG = clipG?.pooled.shape[1] ?? 0;
  const columnG = clipL?.hidden.shape[2] ?? pooledWidth - widthG;
  const place = ({ data, shape }: FloatTensor, column: number) => {
    const width = shape[2]!;
    for (let token = 0; token < shape[1]!; token++) {
      context.set(data.subarray(token * width, (token + 1) * width), token * contextWidth + column);
    }
  };
  if (clipL && keep.clipL) {
    place(clipL.hidden, 0);
    pooled.set(clipL.pooled.data);
  }
  if (clipG && keep.clipG) {
    place(clipG.hidden, columnG);
    pooled.set(clipG.pooled.data, pooledWidth - widthG);
  }
  if (t5 && keep.t5) context.set(t5.data, clipTokens * contextWidth);
  return { context: floats([1, length, contextWidth], context), pooled: floats([1, pooledWidth], pooled) };
}

/** Bytes of each sample of a weight that goes into a digest: enough to tell a fine-tuned network from the original. */
const SAMPLE_BYTES = 4096;
/** Where samples lie: at a weight's begin, in its middle, at its end. */
const SAMPLED_AT = [0, 0.5, 1];

/** Tells networks apart by configuration and samples of all weights, wherever their files lie and what they are called. */
async function weightsDigest(
  { config, tensors }: PartWeights<object>,
  counts: (name: string) => boolean = () => true,
): Promise<string> {
  const hash = createHash('sha256').update(JSON.stringify(Object.entries(config).sort(([a], [b]) => (a < b ? -1 : 1))));
  for (const [name, { spans, quantized }] of [...tensors].sort(([a], [b]) => (a < b ? -1 : 1))) {
    if (!counts(name)) continue;
    for (const { source, encoding, shape, offset, byteLength, scale } of [...spans, ...(quantized?.scales ?? [])]) {
      hash.update(JSON.stringify([name, quantized?.precision, encoding, shape, byteLength, scale]));
      const length = Math.min(byteLength, SAMPLE_BYTES);
      for (const share of SAMPLED_AT) {
        hash.update(await readExactly(source, offset + Math.floor(share * (byteLength - length)), length));
      }
    }
  }
  return hash.digest('hex');
}

/** The bits of a half-precision number that are all set in infinities and NaN. */
const NOT_FINITE = 0x7c00;

/**
 * Rounds to half precision, as the SD3 paper keeps text embeddings.
 * @throws MmditxError `not-finite`
 */
function halved(network: string, { shape, data }: FloatTensor): TensorData {
  const bits = toFloat16(data);
  if (bits.some((value) => (value & NOT_FINITE) === NOT_FINITE)) {
    throw new MmditxError(
      'not-finite',
      `The ${network} gives values that are not finite, or too large for half precision; check its weights.`,
    );
  }
  return { dtype: 'float16', shape, data: bits };
}

function expanded(tensors: ReadonlyMap<string, TensorData>): Tensors {
  return new Map([...tensors].map(([name, tensor]) => [name, floats(tensor.shape, toFloat32(tensor))]));
}

/** Tensors by key, those that were not used for the longest time given up for others. */
function recentlyUsed(mostBytes: number) {
  const kept = new Map<string, { tensors: Tensors; bytes: number }>();
  let bytes = 0;
  const remove = (key: string) => {
    bytes -= kept.get(key)?.bytes ?? 0;
    kept.delete(key);
  };
  return {
    get(key: string): Tensors | undefined {
      return kept.get(key)?.tensors;
    },
    /** Keeps tensors, or notes that they were used. */
    set(key: string, tensors: Tensors): void {
      remove(key);
      const own = [...tensors.values()].reduce((sum, { data }) => sum + data.byteLength, 0);
      if (own > mostBytes) return;
      kept.set(key, { tensors, bytes: own });
      bytes += own;
      for (const oldest of kept.keys()) {
        if (bytes <= mostBytes) break;
        remove(oldest);
      }
    },
    clear(): void {
      kept.clear();
      bytes = 0;
    },
  };
}
