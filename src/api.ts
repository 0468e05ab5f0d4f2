/** What both entries of the package export. */

export { type ErrorCode, MmditxError } from './errors.ts';
export type { RgbImage } from './image/image.ts';
export { imageFromTensor, maskFromImage, tensorFromImage } from './image/image.ts';
export { decodePng, encodePng } from './image/png.ts';
export { type GenerationSettings, settingsFromPng } from './image/settings.ts';
export type { ModelDefaults } from './pipeline/defaults.ts';
export type { GenerateOptions } from './pipeline/options.ts';
export type { GeneratedImage, GenerationEvent, StableDiffusion } from './pipeline/pipeline.ts';
export { DEVICES, type Device } from './runtime/runtime.ts';
export { diffusersDefaults, modelCardDefaults, stabilityDefaults } from './sampling/defaults.ts';
export type { SkipLayerGuidance } from './sampling/guidance.ts';
export { type SamplerName, samplerNames } from './sampling/samplers.ts';
export { type ScheduleName, scheduleNames } from './sampling/schedules.ts';
export { VERSION } from './version.ts';
export { PRECISIONS, type Precision } from './weights/convert.ts';
export { type Lora, type LoraUse, openLora } from './weights/lora.ts';
export { type ByteSource, blobSource } from './weights/safetensors.ts';
