/**
 * The settings a picture was made with, as they are stored inside its PNG file: all of them as JSON under our own
 * keyword, and those that other programs know as the `parameters` text of stable-diffusion-webui (A1111).
 */
import { z } from 'zod';
import { MmditxError } from '../errors.ts';
import { type SamplerName, samplerNames } from '../sampling/samplers.ts';
import { MAX_STEPS, type ScheduleName, scheduleNames } from '../sampling/schedules.ts';
import { isCount, listOf, parseJson, shortList } from '../weights/json.ts';
import { pngText } from './png.ts';

/** PNG keywords of the two texts. */
export const SETTINGS_KEYWORD = 'mmditx';
export const PARAMETERS_KEYWORD = 'parameters';

/** Grows when a stored setting changes its meaning; new ones with a default do not count. */
const SETTINGS_VERSION = 1;

const MAX_SEED = 2n ** 64n - 1n;
/** More than a command line has room for. */
const MAX_LORAS = 1000;

const sha256 = z.string().regex(/^[0-9a-f]{64}$/, 'must be a SHA-256 in hexadecimal');
const share = z.number().min(0).max(1);

/** In JSON a number up to 2^53 - 1 and a decimal string beyond, so that no reader rounds it. */
const seed = z
  .union([
    z.int().nonnegative(),
    z.bigint(),
    z
      .string()
      .regex(/^\d{1,20}$/, 'must be a whole number')
      .transform(BigInt),
  ])
  .refine((value) => value >= 0 && value <= MAX_SEED, 'must be from 0 to 2^64 - 1')
  .transform((value) => (value <= Number.MAX_SAFE_INTEGER ? Number(value) : value));

const settingsSchema = z.object({
  version: z.literal(SETTINGS_VERSION),
  /** Name and version of the program that made the picture, such as `mmditx 0.1.0`. */
  software: z.string(),
  model: z.object({
    /** File name without its folder. */
    name: z.string(),
    /** Hash that tells files of one name apart, such as that of the file's header; null when unknown. */
    hash: z.string().nullable(),
  }),
  /** What the model ran on, such as `cpu` or `webgpu`, and the element type it computed in. */
  device: z.string(),
  precision: z.string(),

  prompt: z.string(),
  negativePrompt: z.string(),
  /** How the prompts became tokens; see `TokenOptions`. */
  promptSyntax: z.enum(['comfy', 'a1111', 'none']),
  longPrompt: z.enum(['chunk', 'truncate']),
  t5Tokens: z.union([z.object({ minimum: z.int().positive() }), z.object({ length: z.int().positive() })]),

  /** Size in pixels. */
  width: z.int().positive(),
  height: z.int().positive(),
  steps: z.int().positive().max(MAX_STEPS),
  /** Classifier-free guidance scale. */
  cfg: z.number(),
  sampler: z.enum(samplerNames),
  scheduler: z.enum(scheduleNames),
  /** Timestep shift. */
  shift: z.number().positive(),
  seed,
  /** Which picture of a batch this is, from 0, and how many there were: the noise is drawn for a batch at once. */
  batch: z
    .object({ index: z.int().nonnegative(), size: z.int().positive() })
    .refine(({ index, size }) => index < size, 'must have an index below its size'),
  skipLayerGuidance: z
    .object({
      layers: listOf(isCount),
      scale: z.number().nonnegative(),
      start: share,
      end: share,
      rule: z.enum(['steps', 'sigma']),
    })
    .nullable(),

  /** Threshold of the step cache; null without one. */
  stepCache: share.nullable().default(null),

  /** LoRAs given beside the prompt; those that it names stay in it. */
  loras: shortList(z.object({ name: z.string(), strength: z.number(), clipStrength: z.number() }), MAX_LORAS).default(
    [],
  ),

  /** The picture that was redrawn, by `imageHash`; null for a picture from noise alone. */
  initImage: z
    .object({ sha256, strength: share, denoiseRule: z.enum(['stability', 'comfyui', 'diffusers']) })
    .nullable(),
  /** The mask of what was repainted, by `imageHash`, and what of it was read. */
  mask: z.object({ sha256, channel: z.enum(['luminance', 'alpha']) }).nullable(),
});

/** Everything that decides a picture's pixels, and what it was made with. `seed` is a bigint from 2^53 on. */
export type GenerationSettings = z.output<typeof settingsSchema>;

/** Settings as JSON in ASCII, which every PNG text chunk can hold. */
export function formatSettings(settings: GenerationSettings): string {
  const json = JSON.stringify(settings, (_key, value) => (typeof value === 'bigint' ? value.toString() : value));
  return json.replace(/[^\x20-\x7e]/g, (unit) => `\\u${unit.charCodeAt(0).toString(16).padStart(4, '0')}`);
}

/**
 * Settings from what `formatSettings` wrote. Entries this version does not know are left out.
 * @throws MmditxError `bad-file` for anything else, or for settings of a newer version
 */
export function parseSettings(text: string): GenerationSettings {
  const value = parseJson(
    text,
    (fault) =>
      new MmditxError('bad-file', `The text of the picture's settings ${fault}; give the settings as options instead.`),
  );
  const version = z.object({ version: z.int().gt(SETTINGS_VERSION) }).safeParse(value);
  if (version.success) {
    throw new MmditxError(
      'bad-file',
      `The picture's settings have version ${version.data.version}, this program knows up to ${SETTINGS_VERSION}; update mmditx.`,
    );
  }
  const parsed = settingsSchema.safeParse(value);
  if (parsed.success) return parsed.data;
  const issue = parsed.error.issues[0];
  throw new MmditxError(
    'bad-file',
    `The picture's settings are wrong at "${issue?.path.join('.')}" (${issue?.message}); give the settings as options instead.`,
  );
}

/** The names stable-diffusion-webui shows, or its successor Forge where it has no such sampler. */
const samplerTitles: Readonly<Record<SamplerName, string>> = {
  euler: 'Euler',
  heun: 'Heun',
  dpm_2: 'DPM2',
  euler_ancestral: 'Euler a',
  dpmpp_2m: 'DPM++ 2M',
  dpmpp_2m_sde: 'DPM++ 2M SDE',
  dpmpp_2m_sde_heun: 'DPM++ 2M SDE Heun',
  dpmpp_sde: 'DPM++ SDE',
  res_multistep: 'Res Multistep',
  lcm: 'LCM',
  ipndm: 'IPNDM',
  deis: 'DEIS',
  gradient_estimation: 'Gradient Estimation',
};

const scheduleTitles: Readonly<Record<ScheduleName, string>> = {
  normal: 'Normal',
  simple: 'Simple',
  sgm_uniform: 'SGM Uniform',
  ddim_uniform: 'DDIM',
  beta: 'Beta',
  karras: 'Karras',
  exponential: 'Exponential',
  linear_quadratic: 'Linear Quadratic',
  kl_optimal: 'KL Optimal',
};

/**
 * The `parameters` text of stable-diffusion-webui: prompt, negative prompt if there is one, and a line of fields.
 * There is no `Model hash`, which is part of the SHA-256 of a whole file and is not computed here.
 */
export function formatParameters(settings: GenerationSettings): string {
  const { prompt, negativePrompt, batch, skipLayerGuidance: skip, initImage } = settings;
  const fields: [string, string | number | bigint][] = [
    ['Steps', settings.steps],
    ['Sampler', samplerTitles[settings.sampler]],
    ['Schedule type', scheduleTitles[settings.scheduler]],
    ['CFG scale', settings.cfg],
    ['Seed', settings.seed],
    ['Size', `${settings.width}x${settings.height}`],
    ['Model', settings.model.name.replace(/\.safetensors$/, '')],
    ['Shift', settings.shift],
  ];
  if (initImage) fields.push(['Denoising strength', initImage.strength]);
  if (batch.size > 1) fields.push(['Batch size', batch.size], ['Batch pos', batch.index]);
  if (skip) {
    fields.push(
      ['Skip layers', skip.layers.join(', ')],
      ['Skip layer scale', skip.scale],
      ['Skip layer start', skip.start],
      ['Skip layer end', skip.end],
      ['Skip layer rule', skip.rule],
    );
  }
  if (settings.stepCache !== null) fields.push(['Step cache', settings.stepCache]);
  fields.push(['Version', settings.software]);
  const negative = negativePrompt === '' ? [] : [`${NEGATIVE_PROMPT} ${negativePrompt}`];
  const line = fields.map(([name, value]) => `${name}: ${quoteField(String(value))}`).join(', ');
  return [prompt, ...negative, line].join('\n');
}

const NEGATIVE_PROMPT = 'Negative prompt:';

/** stable-diffusion-webui quotes a value as JSON when it has a character that ends a value or a name. */
function quoteField(value: string): string {
  return /[,:\n]/.test(value) ? JSON.stringify(value) : value;
}

/** What a `parameters` text says, as far as it could be understood; what could not is `undefined` here. */
export interface Parameters {
  readonly prompt: string;
  /** Empty when there is none. */
  readonly negativePrompt: string;
  readonly width?: number;
  readonly height?: number;
  readonly steps?: number;
  readonly cfg?: number;
  readonly sampler?: SamplerName;
  readonly scheduler?: ScheduleName;
  readonly shift?: number;
  /** A bigint from 2^53 on. */
  readonly seed?: number | bigint;
  readonly strength?: number;
  readonly skipLayerGuidance?: NonNullable<GenerationSettings['skipLayerGuidance']>;
  readonly stepCache?: number;
  /** Every field as it was written, unquoted: also those above. */
  readonly fields: ReadonlyMap<string, string>;
}

/**
 * Reads a `parameters` text of stable-diffusion-webui or of a program that writes the same, ours included. The fields
 * are those of the last line that begins with `Steps:`; a text without one is a prompt. Never throws.
 */
export function parseParameters(text: string): Parameters {
  const lines = text.replaceAll('\r\n', '\n').split('\n');
  const fieldLine = lines.findLastIndex((line) => line.trimStart().startsWith('Steps:'));
  const fields = parseFields(lines[fieldLine] ?? '');
  const prompts = fieldLine < 0 ? lines : lines.slice(0, fieldLine);
  const firstNegative = prompts.findIndex((line) => line.startsWith(NEGATIVE_PROMPT));
  const negative = firstNegative < 0 ? [] : prompts.splice(firstNegative);

  const size = /^(\d{1,6})x(\d{1,6})$/.exec(fields.get('Size') ?? '');
  const read = <T>(name: string, schema: z.ZodType<T>): T | undefined => schema.safeParse(fields.get(name)).data;
  const number = z
    .string()
    .regex(/^[-+\d.e]+$/i)
    .transform(Number)
    .pipe(z.number());
  const understood = definedOnly({
    width: size ? Number(size[1]) : undefined,
    height: size ? Number(size[2]) : undefined,
    steps: read('Steps', number.pipe(settingsSchema.shape.steps)),
    cfg: read('CFG scale', number),
    ...readSampler(fields.get('Sampler') ?? '', fields.get('Schedule type') ?? ''),
    shift: read('Shift', number.pipe(settingsSchema.shape.shift)),
    seed: read('Seed', seed),
    strength: read('Denoising strength', number.pipe(share)),
    skipLayerGuidance: readSkipLayers(fields, number),
    stepCache: read('Step cache', number.pipe(share)),
  });
  return {
    prompt: prompts.join('\n').trimEnd(),
    negativePrompt: negative.join('\n').slice(NEGATIVE_PROMPT.length).trim(),
    ...understood,
    fields,
  };
}

type DefinedOnly<T> = { [Key in keyof T]?: Exclude<T[Key], undefined> };

function definedOnly<T extends object>(values: T): DefinedOnly<T> {
  return Object.fromEntries(Object.entries(values).filter(([, value]) => value !== undefined)) as DefinedOnly<T>;
}

/** The fields of a line `Name: value, Name: "quoted, value"`. One pass, whatever the line. */
function parseFields(line: string): Map<string, string> {
  const fields = new Map<string, string>();
  const add = (field: string) => {
    const colon = field.indexOf(':');
    if (colon > 0) fields.set(field.slice(0, colon).trim(), unquoteField(field.slice(colon + 1).trim()));
  };
  let start = 0;
  let isQuoted = false;
  let previous = '';
  for (let i = 0; i < line.length; i++) {
    const character = line[i]!;
    if (isQuoted && character === '\\') i++;
    else if (isQuoted) isQuoted = character !== '"';
    else if (character === '"') isQuoted = previous === ':';
    else if (character === ',') {
      add(line.slice(start, i));
      start = i + 1;
    }
    if (character !== ' ') previous = character;
  }
  add(line.slice(start));
  return fields;
}

function unquoteField(value: string): string {
  if (!value.startsWith('"')) return value;
  try {
    return z.string().parse(JSON.parse(value));
  } catch {
    return value;
  }
}

/**
 * Sampler and schedule by the names shown or by ComfyUI's, in any case. Until 2024 stable-diffusion-webui wrote both as
 * one name, as in `DPM++ 2M Karras`.
 */
function readSampler(sampler: string, schedule: string): { sampler?: SamplerName; scheduler?: ScheduleName } {
  const named = schedule === '' ? undefined : byName(scheduleTitles, schedule);
  const whole = byName(samplerTitles, sampler);
  if (whole) return definedOnly({ sampler: whole, scheduler: named });
  for (const [name, title] of Object.entries(scheduleTitles)) {
    const ending = [name, title].find((form) => sampler.toLowerCase().endsWith(` ${form.toLowerCase()}`));
    if (ending === undefined) continue;
    const rest = byName(samplerTitles, sampler.slice(0, -ending.length).trim());
    return definedOnly({ sampler: rest, scheduler: named ?? (rest && (name as ScheduleName)) });
  }
  return definedOnly({ sampler: undefined, scheduler: named });
}

function byName<Name extends string>(titles: Readonly<Record<Name, string>>, text: string): Name | undefined {
  const wanted = text.toLowerCase();
  const names = Object.keys(titles) as Name[];
  return names.find((name) => name === wanted || titles[name].toLowerCase() === wanted);
}

function readSkipLayers(fields: ReadonlyMap<string, string>, number: z.ZodType<number>) {
  return settingsSchema.shape.skipLayerGuidance.unwrap().safeParse({
    layers: fields.get('Skip layers')?.split(',').map(Number),
    scale: number.safeParse(fields.get('Skip layer scale')).data,
    start: number.safeParse(fields.get('Skip layer start')).data,
    end: number.safeParse(fields.get('Skip layer end')).data,
    rule: fields.get('Skip layer rule'),
  }).data;
}

/** The texts that `encodePng` is to write for a picture with these settings. */
export function settingsText(settings: GenerationSettings): Map<string, string> {
  return new Map([
    [PARAMETERS_KEYWORD, formatParameters(settings)],
    [SETTINGS_KEYWORD, formatSettings(settings)],
  ]);
}

/** Where a picture's settings came from tells how complete they are. */
export type PictureSettings =
  | { readonly source: 'mmditx'; readonly settings: GenerationSettings }
  | { readonly source: 'parameters'; readonly settings: Parameters };

/**
 * The settings inside a PNG file: our own if it has them, else those of another program; `undefined` without either.
 * @throws MmditxError `bad-file` when it is no PNG file, is damaged, or holds settings of ours that cannot be read
 */
export function settingsFromPng(bytes: Uint8Array): PictureSettings | undefined {
  const texts = pngText(bytes);
  const own = texts.get(SETTINGS_KEYWORD);
  if (own !== undefined) return { source: 'mmditx', settings: parseSettings(own) };
  const parameters = texts.get(PARAMETERS_KEYWORD);
  return parameters === undefined ? undefined : { source: 'parameters', settings: parseParameters(parameters) };
}
