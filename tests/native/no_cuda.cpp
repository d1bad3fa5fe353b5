int pythia_no_cuda = 1;  // a library without a driver in it
