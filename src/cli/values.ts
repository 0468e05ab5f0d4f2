/** Values of options: from the words of a command line to numbers and lists, and options that commands share. */
import { type Command, InvalidArgumentError, Option } from 'commander';
import { DEVICES, type Device } from '../runtime/runtime.ts';
import type { SkipLayerGuidance } from '../sampling/guidance.ts';
import { type SamplerName, samplerNames } from '../sampling/samplers.ts';
import { type ScheduleName, scheduleNames } from '../sampling/schedules.ts';
import { PRECISIONS, type Precision } from '../weights/convert.ts';

export function wholeNumber(text: string): number {
  if (!/^[-+]?\d{1,15}$/.test(text)) throw new InvalidArgumentError('give a whole number');
  return Number(text);
}

export function decimal(text: string): number {
  if (!/^[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$/i.test(text)) throw new InvalidArgumentError('give a number');
  return Number(text);
}

/** A bigint where a number would not be exact. */
export function seed(text: string): number | bigint {
  if (!/^\d{1,20}$/.test(text)) throw new InvalidArgumentError('give a whole number from 0 to 2^64 - 1');
  const value = BigInt(text);
  return value <= Number.MAX_SAFE_INTEGER ? Number(value) : value;
}

export interface Size {
  readonly width: number;
  readonly height: number;
}

export function size(text: string): Size {
  const [, width, height] = /^(\d{1,6})x(\d{1,6})$/i.exec(text) ?? [];
  if (!width || !height) throw new InvalidArgumentError('give width and height in pixels, such as 1024x768');
  return { width: Number(width), height: Number(height) };
}

/** Lengths of a tensor's axes. */
export function shape(text: string): number[] {
  if (!/^[1-9]\d{0,8}(x[1-9]\d{0,8}){0,7}$/i.test(text)) {
    throw new InvalidArgumentError('give the lengths of its axes, such as 1x16x8x8');
  }
  return text.split(/x/i).map(Number);
}

/** Indices of transformer blocks. */
export function layers(text: string): number[] {
  if (!/^\d{1,4}(,\d{1,4})*$/.test(text)) {
    throw new InvalidArgumentError('give numbers of layers with commas between them, such as 7,8,9');
  }
  return text.split(',').map(Number);
}

/** Collects the values of an option that may be given several times. */
export function repeated(value: string, previous: readonly string[] = []): string[] {
  return [...previous, value];
}

/** An object without its undefined members, so that defaults can be laid under it. */
export function defined<T extends object>(values: T): { [Key in keyof T]?: Exclude<T[Key], undefined> } {
  return Object.fromEntries(Object.entries(values).filter(([, value]) => value !== undefined)) as {
    [Key in keyof T]?: Exclude<T[Key], undefined>;
  };
}

/** Values of the options of {@link addSamplingOptions}. */
export interface SamplingFlags {
  readonly steps?: number;
  readonly cfg?: number;
  readonly sampler?: SamplerName;
  readonly scheduler?: ScheduleName;
  readonly shift?: number;
  readonly slgScale?: number;
  readonly slgStart?: number;
  readonly slgEnd?: number;
  readonly slgRule?: SkipLayerGuidance['rule'];
}

/** How noise becomes a latent. All defaults are the model's. */
export function addSamplingOptions(command: Command): Command {
  return command
    .option('--steps <count>', 'steps of the sampler', wholeNumber)
    .option('--cfg <scale>', 'classifier-free guidance; 1 switches it off', decimal)
    .addOption(new Option('--sampler <name>', 'sampler').choices(samplerNames))
    .addOption(new Option('--scheduler <name>', 'schedule of noise levels').choices(scheduleNames))
    .option('--shift <factor>', 'timestep shift', decimal)
    .option('--slg-scale <scale>', 'strength of skip-layer guidance', decimal)
    .option('--slg-start <share>', 'where it begins, 0 to 1', decimal)
    .option('--slg-end <share>', 'where it ends, 0 to 1', decimal)
    .addOption(
      new Option('--slg-rule <rule>', 'what the two are shares of: steps (Stability), sigma (ComfyUI)').choices([
        'steps',
        'sigma',
      ]),
    );
}

/** Values of the options of {@link addDeviceOptions}. */
export interface DeviceFlags {
  readonly device?: Device;
  readonly threads?: number;
}

export function addDeviceOptions(command: Command): Command {
  return command
    .addOption(new Option('--device <name>', 'what computes').choices(DEVICES))
    .option('--threads <count>', 'threads of the CPU (default: its processors)', threads);
}

function threads(text: string): number {
  const count = wholeNumber(text);
  if (count < 1 || count > MAX_THREADS) throw new InvalidArgumentError(`give a number from 1 to ${MAX_THREADS}`);
  return count;
}

/** More than any machine has processors: a slip of the finger must not start a million threads. */
const MAX_THREADS = 1024;

/** Values of the options of {@link addPrecisionOption}. */
export interface PrecisionFlags {
  readonly precision?: Precision;
}

export function addPrecisionOption(command: Command): Command {
  return command.addOption(
    new Option(
      '--precision <name>',
      'what weights are kept as: fp32; fp16 or bf16, as stored; int8; int4 (default: what suits model and machine)',
    ).argParser(precision),
  );
}

/** fp16 and bf16 both mean the 16 bits that the file has. */
function precision(name: string): Precision {
  const known = PRECISIONS.find((precision) => precision === (name === 'bf16' ? 'fp16' : name));
  if (!known) throw new InvalidArgumentError(`allowed choices are ${PRECISIONS.join(', ')}, bf16`);
  return known;
}

/** A LoRA file and its strength. */
export interface LoraFlag {
  readonly path: string;
  readonly strength: number;
}

/** `file.safetensors` or `file.safetensors:0.8`; collects the values of an option that may be given several times. */
export function loraFile(text: string, previous: readonly LoraFlag[] = []): LoraFlag[] {
  const [, path, strength] = /^(.+?)(?::([-+]?(?:\d+\.?\d*|\.\d+)))?$/s.exec(text) ?? [];
  if (!path) throw new InvalidArgumentError('give a file, with a strength as in style.safetensors:0.8');
  return [...previous, { path, strength: strength === undefined ? 1 : Number(strength) }];
}
