"""The programs of the repository, and what they are made of; they import `mdeq`, never the other way.

Programs, each with `--help`:
    train, validate, predict, visualize     a model on data
    convert, publish, export                weights: from elsewhere, to the Hub, to ONNX
    benchmark, memory, windows, baseline    measurements
Settings:
    config                                  every key of a config and of the command line, with its default
    program, inputs                         how every program begins and ends; arguments that some share
Data:
    batches                                 what a data set gives to a loop
    data                                    digits, CIFAR-10; from a config to the batches of a split
    image_folders, images                   timm's readers; one image file
    segmentation_data                       images with masks
    volume_data, nifti_data, volumes        sets of volumes; NIfTI pairs; one volume, prepared and restored
    known_data, samples                     licences, classes, citations; a small part of a split
Training and evaluation:
    build                                   from a config to device, processes, model and data
    tasks, losses, metrics, inference       what is learnt, what is counted, how an input is predicted
    engine, optim                           the loops; optimiser, schedule and mixing of images
    run_folder, checkpoint                  a run's folder, claimed once; its files, written whole
Records:
    scores, report                          what is scored, and what it is called; result lines and logs
    results, recheck, card                  what a run reached; the same from its weights again; the model card
    steps, tables                           accuracy against steps; CSV files
Predictions and pictures:
    pretrained, predictors, predictions     a model with weights; inputs through it; what is written of them
    pictures, figures, page                 label maps and overlays; diagrams; the HTML page
    studies, gallery                        what visualize measures, and what it draws of it
Benchmarks:
    contenders, comparison, scaling         what is compared; the parts of the benchmark; the cost model
    timings, peak                           repeats and ratios; peak memory of a process
"""
